#!/bin/sh
# Run by the entrypoint of the nginx image, before nginx: makes the configuration of the two templates; from then on
# rotates the log, and tells nginx when LiteLLM has moved. /etc/nginx/conf.d, /run and /tmp must be writable.
set -eu

render() {
    sed -e '/^#/!s|@LISTEN@|8080|' -e "/^#/!s|@LITELLM@|${LITELLM:?is not set: host:port of LiteLLM}|" \
        -e '/^#/!s|@LOG_DIR@|/billing|' -e '/^#/!s|@PID@|/run/nginx.pid|g' "/etc/billing/$1"
}

umask 022 # the tailer is another user, and must be able to read the log
render audit.conf.template >/etc/nginx/conf.d/default.conf
render logrotate.conf >/tmp/logrotate.conf

# The state lies beside the log: a new container must not begin the day anew. What fails is said, and tried again.
while sleep "${ROTATE_CHECK_SECONDS:-300}"; do
    logrotate --state /billing/.logrotate-state /tmp/logrotate.conf || echo "start.sh: logrotate failed" >&2
done &

# nginx asks for LiteLLM's address only when it reads its configuration, and a container that died may come back under
# another one. No answer is no news: then nginx keeps the address that it has.
address() { getent ahosts "${LITELLM%:*}" | cut -d ' ' -f 1 | sort -u; }
known=$(address)
while sleep 5; do
    now=$(address)
    if [ -n "$now" ] && [ "$now" != "$known" ]; then
        if nginx -s reload; then known=$now; fi
    fi
done &
