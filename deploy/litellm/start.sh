#!/bin/sh
# LiteLLM reads its secrets from the environment only: this takes them out of files, and becomes LiteLLM.
set -eu
set -a
. /run/secrets/litellm_env
DATABASE_URL=$(cat /run/secrets/litellm_database_url)
LITELLM_MASTER_KEY=$(cat /run/secrets/litellm_master_key)
GENERIC_LOGGER_HEADERS="Authorization=Bearer $(cat /run/secrets/callback_token)"
set +a
exec litellm --config /etc/litellm/config.yaml --host 0.0.0.0 --port 4000
