#!/bin/sh
# Makes what compose.yml reads from secrets/ (or the directory that is named): passwords, tokens, DSNs. A file that is
# there stays as it is.
#
#   deploy/secrets.sh                        makes what is missing
#   deploy/secrets.sh --rotate NAME          writes NAME anew; docs/containers.md says what has to hear of it
#
# Containers see these files with the owner and the mode that they have here, and each runs as a user of its own. So the
# files are readable to all, and the directory only to whoever made it: on this machine nobody else comes past it, and a
# container is given only the files that compose.yml names for it.
set -eu
umask 077

random() { # 256 bits, in hexadecimal digits: nothing in it needs quoting in a URL
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

dsn() { # ROLE DATABASE
    echo "postgresql://$1:$(random)@postgres:5432/$2"
}

value_of() {
    case $1 in
    postgres_password | callback_token | api_token | grafana_admin_password) random ;;
    litellm_master_key) echo "sk-$(random)" ;; # LiteLLM insists on the sk-
    migrate_database_url) dsn billing_owner billing ;;
    database_url) dsn billing_tailer billing ;;
    readonly_database_url) dsn billing_readonly billing ;;
    litellm_database_url) dsn litellm litellm ;;
    litellm_env)
        echo '# The keys of your providers, as NAME=VALUE, for deploy/litellm/config.yaml. LiteLLM alone sees them.'
        echo '# OPENAI_API_KEY=sk-...'
        ;;
    *)
        echo "secrets.sh: there is no secret $1: see the list at the end of compose.yml" >&2
        exit 2
        ;;
    esac
}

write() { # in place: a running container keeps seeing the file
    value=$(value_of "$1")
    echo "$value" >"$directory/$1"
    chmod 0644 "$directory/$1"
    echo "written: $directory/$1"
}

rotate=
if [ "${1:-}" = --rotate ]; then
    rotate=${2:?name the secret}
    shift 2
fi
directory=${1:-$(dirname "$0")/../secrets}
mkdir -p "$directory"
chmod 0700 "$directory"
if [ -n "$rotate" ]; then
    write "$rotate"
    exit
fi
for name in postgres_password migrate_database_url database_url readonly_database_url litellm_database_url \
    litellm_master_key litellm_env callback_token api_token grafana_admin_password; do
    if [ -s "$directory/$name" ]; then
        chmod 0644 "$directory/$name" # a value of your own, written with another umask
    else
        write "$name"
    fi
done
