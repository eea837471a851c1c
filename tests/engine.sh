#!/usr/bin/env bash
# Bring up a Docker engine and the base image of the tests marked `docker`, where this user may; says so where not.
#
#   tests/engine.sh && tests/run.sh --slow -m docker tests
#
# Installs docker.io and debootstrap through apt, starts dockerd by hand if no engine answers (log: /tmp/dockerd.log), and
# makes swe-dagger-test-base (Debian, git, Python, pytest) with debootstrap: no registry is asked.
set -euo pipefail
image=swe-dagger-test-base

answers() { docker version >/dev/null 2>&1; }
if ! answers; then
    [ "$(id -u)" = 0 ] || { echo "no Docker engine answers, and only root can start one" >&2; exit 1; }
    if ! command -v dockerd >/dev/null; then
        { apt-get -qq update && apt-get -qq install -y --no-install-recommends docker.io iptables; } >/dev/null
    fi
    rm -f /var/run/docker.pid
    nohup dockerd --log-level warn >/tmp/dockerd.log 2>&1 &
    for _ in $(seq 60); do answers && break; sleep 1; done
    answers || { echo "dockerd did not start:" >&2; tail -5 /tmp/dockerd.log >&2; exit 1; }
fi
if ! docker image inspect $image >/dev/null 2>&1; then
    if ! command -v debootstrap >/dev/null; then
        { apt-get -qq update && apt-get -qq install -y --no-install-recommends debootstrap; } >/dev/null
    fi
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    . /etc/os-release
    debootstrap --variant=minbase --include=git,patch,python3,python3-pytest,ca-certificates \
        "$VERSION_CODENAME" "$root/base" >/tmp/debootstrap.log 2>&1 || { tail -5 /tmp/debootstrap.log >&2; exit 1; }
    rm -rf "$root"/base/var/cache/apt "$root"/base/var/lib/apt/lists "$root"/base/usr/share/{doc,man,locale}
    ln -sf python3 "$root/base/usr/bin/python"
    tar -C "$root/base" -c . | docker import - $image >/dev/null
fi
