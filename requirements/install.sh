#!/bin/sh
# Creates .venv and installs one lock file into it: requirements/install.sh train|gpu|dev
# Needs git, make and any Python with venv or pip; no root, no system package. Safe to run again.
set -eu
lock=$1
uv_version=0.13.8 # the version that made the lock files
cd "$(dirname "$0")/.."

stop() {
    echo "setup: $*" >&2
    exit 1
}

case "$(uname -s)-$(uname -m)" in
Linux-x86_64 | Linux-aarch64 | Darwin-arm64) ;;
*) stop "no packages for $(uname -s) $(uname -m): expected Linux on x86-64 or arm64, or macOS on Apple silicon" ;;
esac
if [ "$(uname -s)" = Linux ] && ! getconf GNU_LIBC_VERSION >/dev/null 2>&1; then
    stop "no packages for this C library: expected glibc 2.28 or newer (musl has no TensorFlow wheel)"
fi

find_python() {
    for name in python3.13 python3.12 python3.11 python3 python; do
        if command -v "$name" >/dev/null 2>&1 && "$name" -c 'import sys' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    stop "neither uv nor Python is on PATH: install Python 3.11, 3.12 or 3.13 (with venv) and run make again"
}

find_uv() {
    if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then
        echo uv
        return
    fi
    if [ ! -x .tools/uv/bin/uv ]; then
        python=$(find_python)
        rm -rf .tools/uv
        # A venv where the module is whole, else pip alone: Debian splits venv into a package of its own.
        if "$python" -m venv .tools/uv >/dev/null 2>&1; then
            .tools/uv/bin/python -m pip install --quiet "uv==$uv_version" >&2 || stop "pip could not install uv $uv_version: see its message above"
        elif "$python" -m pip --version >/dev/null 2>&1; then
            rm -rf .tools/uv
            "$python" -m pip install --quiet --target .tools/uv "uv==$uv_version" >&2 || stop "pip could not install uv $uv_version: see its message above"
        else
            stop "this Python has neither the venv module nor pip: install python3-venv (Debian, Ubuntu: apt install python3-venv) or put uv on PATH"
        fi
    fi
    echo .tools/uv/bin/uv
}

uv=$(find_uv)
export UV_SYSTEM_CERTS=1 # the machine's own certificates, as every other program here uses
[ -x .venv/bin/python ] || "$uv" venv --quiet --allow-existing --python '>=3.11,<3.14' .venv ||
    stop "no Python 3.11, 3.12 or 3.13 found, and none could be fetched: install one and run make again"
echo "setup: installing requirements/$lock.lock into .venv"
"$uv" pip sync --quiet --python .venv --require-hashes --compile-bytecode "requirements/$lock.lock" ||
    stop "the packages could not be installed: see the message above; with the network back, run make again"
touch ".venv/.$lock"
