#!/usr/bin/env bash
# Runs a server behind a named Cloudflare Tunnel: behind_tunnel COMMAND...
# CLOUDFLARE_TUNNEL is blue or green: the tunnel whose token is in CLOUDFLARE_TUNNEL_TOKEN_BLUE or _GREEN.
# SIGTERM goes to the server; the tunnel stays open until the server has ended, so that the last answers are delivered.
# The exit status is the server's. A tunnel that ends is restarted, while the server keeps running.
set -euo pipefail

tunnel=${CLOUDFLARE_TUNNEL:-}
case $tunnel in
blue) token=${CLOUDFLARE_TUNNEL_TOKEN_BLUE:-} ;;
green) token=${CLOUDFLARE_TUNNEL_TOKEN_GREEN:-} ;;
*)
    echo "CLOUDFLARE_TUNNEL must be blue or green, not '$tunnel'" >&2
    exit 1
    ;;
esac
if [ -z "$token" ]; then
    echo "CLOUDFLARE_TUNNEL_TOKEN_${tunnel^^} is not set: it is the token of the tunnel $tunnel" >&2
    exit 1
fi
if ! command -v cloudflared >/dev/null; then
    echo "cloudflared is not installed: build this image with deploy/vast/Dockerfile" >&2
    exit 1
fi
# The server does not need them.
unset CLOUDFLARE_TUNNEL_TOKEN_BLUE CLOUDFLARE_TUNNEL_TOKEN_GREEN

keep_tunnel() {
    trap 'kill $(jobs -p) 2>/dev/null; exit 0' TERM
    while true; do
        # In the environment, because every process of the machine can read arguments.
        TUNNEL_TOKEN=$token cloudflared --no-autoupdate tunnel run &
        status=0
        # bash handles signals immediately only during `wait`.
        wait "$!" || status=$?
        echo "cloudflared ended with status $status; restarting it in 5 s" >&2
        sleep 5 &
        wait "$!"
    done
}

keep_tunnel &
tunnel_pid=$!
# Not with exec: at a stop the server's runner waits for all other children of its parent process.
"$@" &
server_pid=$!
trap 'kill -TERM "$server_pid" 2>/dev/null || true' TERM INT

# A signal interrupts `wait` before the server has ended.
while true; do
    status=0
    wait "$server_pid" || status=$?
    kill -0 "$server_pid" 2>/dev/null || break
done
kill "$tunnel_pid"
exit "$status"
