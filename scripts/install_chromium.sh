#!/usr/bin/env bash
# Chromium for the tests of the report in a browser: Debian's package, installed where that may be.
# Ends with 0 either way; without a browser pytest lists these tests as skipped, with the reason.
set -euo pipefail

there() { command -v chromium >/dev/null || command -v chromium-browser >/dev/null; }
there && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "chromium is missing and can be installed by root through apt-get alone: the tests of the report in a browser will be skipped" >&2
    exit 0
fi
# a browser without any font draws no text
apt-get -q update \
    && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends chromium fonts-dejavu-core \
    && there \
    || echo "chromium could not be installed: the tests of the report in a browser will be skipped" >&2
