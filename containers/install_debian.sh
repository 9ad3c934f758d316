# Install Debian packages at exactly the versions of a lock: sh install_debian.sh LOCK
# Fails when apt would bring a package that the lock does not name. APT_MIRROR replaces the archive's address.
set -eu
lock=$1
export DEBIAN_FRONTEND=noninteractive
if [ -n "${APT_MIRROR:-}" ]; then
    printf 'deb [check-valid-until=no] %s/debian bookworm main\ndeb [check-valid-until=no] %s/debian-security bookworm-security main\n' \
        "$APT_MIRROR" "$APT_MIRROR" > /etc/apt/sources.list
    rm -f /etc/apt/sources.list.d/*
fi
apt-get update -qq
dpkg-query -W -f '${Package}\n' | sort > /tmp/before
if ! grep -v '^#' "$lock" | xargs apt-get install -qq -y --no-install-recommends --allow-downgrades; then
    echo "install_debian: $lock cannot be installed; where a version has left the archive, take it from the archive of the" \
        "lock's date (APT_MIRROR, containers/README.md) or pin today's: make lock ARGS=--debian" >&2
    exit 1
fi
grep -v '^#' "$lock" | cut -d= -f1 | sort > /tmp/locked
dpkg-query -W -f '${Package}\n' | sort | comm -13 /tmp/before - | comm -23 - /tmp/locked > /tmp/extra
if [ -s /tmp/extra ]; then
    echo "install_debian: not in $lock: $(tr '\n' ' ' < /tmp/extra); write it anew: make lock ARGS=--debian" >&2
    exit 1
fi
# What differs from build to build and nobody reads: indexes, caches, logs.
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache /var/log/*.log \
    /var/log/apt /tmp/before /tmp/locked /tmp/extra
