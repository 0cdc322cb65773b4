#!/bin/sh
# Sees to the system packages that building needs: installs what is missing through apt where this user may
# (root, or sudo without a password), otherwise names it and stops. Quiet and quick when nothing is missing.
# Usage: require_system.sh PYTHON CC
python=$1 cc=$2
missing=

have() { command -v "$1" >/dev/null 2>&1; }

need() { missing="$missing $1"; }

have "$python" || need python3
have "$cc" || need gcc
have make || need make
have pkg-config || need pkg-config
have pkg-config && pkg-config --exists libcjson || need libcjson-dev
if have "$python"; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or later is needed; $python is $("$python" -V 2>&1). Name another: make PYTHON=..." >&2
        exit 1
    }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need python3-venv
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    [ -e "$header" ] || need python3-dev
else
    need python3-venv
    need python3-dev
fi
[ -z "$missing" ] && exit 0

as_root=
if ! have apt-get; then
    echo "These are missing, and there is no apt-get here to install them (names as on Debian):$missing" >&2
    exit 1
elif [ "$(id -u)" != 0 ]; then
    if have sudo && sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    else
        echo "These system packages are missing, and installing them needs root:" >&2
        echo "    sudo apt-get install$missing" >&2
        exit 1
    fi
fi
echo "Installing system packages:$missing"
$as_root apt-get update -q && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y $missing || {
    echo "apt-get could not install:$missing" >&2
    exit 1
}
if [ -n "${header:-}" ] && [ ! -e "$header" ]; then
    echo "$header is still missing: $python is not the system's Python; install its development files" >&2
    exit 1
fi
