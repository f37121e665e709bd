#!/usr/bin/env bash
# Puts prometheus and promtool into a folder: links to those that are installed, else the programs of Debian's package, which
# is unpacked and not installed. So no daemon starts and nothing of the system changes; no root is needed.
set -euo pipefail
into=$1

if found=$(command -v prometheus) && tool=$(command -v promtool); then
    ln -sf "$found" "$tool" "$into/"
    exit
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "Prometheus is not installed, and this is no Debian that could fetch it: see prometheus.io/download" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
if ! apt-get download -qq prometheus 2>/dev/null; then
    [ "$(id -u)" = 0 ] && apt-get update -qq  # the lists of packages are missing or old
    apt-get download -qq prometheus
fi
dpkg-deb --extract prometheus_*.deb unpacked
mv unpacked/usr/bin/prometheus unpacked/usr/bin/promtool "$into/"
