#!/bin/bash
# Makes a base image without an image registry: Debian 12 with its Python 3.11, by debootstrap. Needs root.
# Usage: local_base.sh NAME [PREFIX]; the Python that is installed below PREFIX precedes Debian's.
set -euo pipefail
name=${1:?the name of the image}
prefix=${2:-}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mirror=$(awk '/^URIs:/ {print $2; exit}' /etc/apt/sources.list.d/debian.sources)

echo "debootstrap from $mirror (about 45 s)"
# A CPython that was built on Debian 12 links to these libraries.
debootstrap --variant=minbase \
    --include=ca-certificates,python3,python3-venv,libffi8,libsqlite3-0,libbz2-1.0,liblzma5,libreadline8,libssl3,zlib1g \
    bookworm "$root" "$mirror" >"$root.log" 2>&1 || { tail -20 "$root.log"; exit 1; }
rm -rf "$root.log" "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/*
# The container tool mounts its own files over these; this machine's must not be in the image.
for file in hosts hostname resolv.conf; do : >"$root/etc/$file"; done
if [ -n "$prefix" ]; then
    cp -a "$prefix"/. "$root/usr/local/"
    chroot "$root" ldconfig
fi
tar -C "$root" -c . | podman import --quiet - "$name"
