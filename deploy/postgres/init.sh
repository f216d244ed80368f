#!/bin/sh
# Logins and databases of compose.yml. Passwords are taken out of the DSNs in SECRETS; they never stand in an
# argument, where `ps` would show them.
#
#   init.sh           makes the logins and databases that are missing and sets the passwords. The postgres image runs it
#                     when its data directory is empty; run it again after a secret has changed
#   init.sh grants    as the owner, after every `billing-tailer migrate`: what the other roles may do (grants.sql)
set -eu

owner=billing_owner daemon=billing_tailer readonly=billing_readonly litellm=litellm
database=billing schema=billing

password_in() {
    dsn=$(cat "${SECRETS:-/run/secrets}/$1")
    dsn=${dsn#*://*:}
    echo "${dsn%%@*}"
}

as_superuser() {
    psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname "$1"
}

login() { # ROLE SECRET
    ROLE=$1 PASSWORD=$(password_in "$2") as_superuser postgres <<'SQL'
\getenv role ROLE
\getenv password PASSWORD
select format('create role %I', :'role')
    where not exists (select from pg_roles where rolname = :'role') \gexec
alter role :"role" with login password :'password';
SQL
}

own_database() { # NAME OWNER; texts are compared by bytes: docs/operating.md says why
    NAME=$1 OWNER=$2 as_superuser postgres <<'SQL'
\getenv name NAME
\getenv owner OWNER
select format('create database %I template template0 encoding ''UTF8'' lc_collate ''C''', :'name')
    where not exists (select from pg_database where datname = :'name') \gexec
alter database :"name" owner to :"owner";
revoke all on database :"name" from public;
SQL
}

if [ "${1:-}" = grants ]; then
    PGPASSWORD=$(password_in migrate_database_url) exec psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 \
        --host "${PGHOST:-postgres}" --username "$owner" --dbname "$database" \
        --set schema="$schema" --set owner="$owner" --set daemon="$daemon" --set readonly="$readonly" \
        --file "$(dirname "$0")/grants.sql"
fi

login "$owner" migrate_database_url
login "$daemon" database_url
login "$readonly" readonly_database_url
login "$litellm" litellm_database_url
own_database "$database" "$owner"
own_database litellm "$litellm"
as_superuser postgres <<SQL
grant connect on database $database to $daemon, $readonly;
grant temporary on database $database to $daemon;
SQL
