#!/usr/bin/env bash
# On-start script for Vast.ai's SSH mode, which replaces the image's entrypoint and runs as root. It starts the
# server and the tunnel as the image's own user. The log is /var/log/sam3.log.
set -euo pipefail

chown 1034:1034 /data /weights
setsid setpriv --reuid=1034 --regid=1034 --clear-groups --no-new-privs \
    env HOME=/home/bentoml \
    /usr/local/bin/behind_tunnel /home/bentoml/bento/env/docker/entrypoint.sh \
    >>/var/log/sam3.log 2>&1 </dev/null &
