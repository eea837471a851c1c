#!/usr/bin/env bash
# Install the headless browser of the tests marked `browser`, where this user may; says so where not.
#
#   tests/chromium.sh && tests/run.sh --slow -m browser tests
#
# Debian's chromium and chromium-driver through apt; nothing else is fetched. Does nothing where both are there.
set -euo pipefail

if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    [ "$(id -u)" = 0 ] || { echo "no chromium or no chromedriver, and only root can install them" >&2; exit 1; }
    command -v apt-get >/dev/null || { echo "no apt here: install Chromium and its chromedriver by hand" >&2; exit 1; }
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium chromium-driver; } >/dev/null
fi
