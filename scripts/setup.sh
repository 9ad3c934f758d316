#!/usr/bin/env bash
# Make the virtual environment that every make target uses: scripts/setup.sh VENV EXTRAS
#
#   PYTHON     interpreter to use (default: the first of python3, python3.12, python3.11, python3.13 that is 3.11 or newer)
#   PIP_FLAGS  more flags for pip, such as an index that holds the CPU-only build of torch (smaller by gigabytes)
#   GPU        1: install the `gpu` extra too; 0: do not; auto (default): do so where nvidia-smi sees a GPU
set -euo pipefail

venv=$1
extras=$2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -r -a pip_flags <<<"${PIP_FLAGS:-}"

is_new_enough() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        if is_new_enough "$PYTHON"; then echo "$PYTHON" && return; fi
        echo "setup: PYTHON=$PYTHON is $("$PYTHON" --version 2>/dev/null || echo missing); Python 3.11 or newer is needed." >&2
        return 1
    fi
    local candidate
    for candidate in python3 python3.12 python3.11 python3.13; do
        if is_new_enough "$candidate"; then echo "$candidate" && return; fi
    done
    echo "setup: no Python 3.11 or newer among python3, python3.12, python3.11, python3.13 (python3 is" \
        "$(python3 --version 2>/dev/null || echo missing)). Install one or name it: make setup PYTHON=/path/to/python3.12" >&2
    return 1
}

if [[ -x "$venv/bin/pip" ]] && is_new_enough "$venv/bin/python"; then
    echo "setup: updating $venv ($("$venv/bin/python" --version))"
else
    python=$(find_python)
    # Debian and Ubuntu ship Python without ensurepip: venv would stop halfway with a page of text.
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "setup: $python has no venv/ensurepip module. On Debian or Ubuntu: sudo apt-get install python$version-venv" >&2
        exit 1
    fi
    echo "setup: making $venv with $python ($("$python" --version))"
    "$python" -m venv --clear "$venv"
fi

# Errors only: pip's warnings about its own configuration say nothing of ours.
pip=("$venv/bin/pip" install --disable-pip-version-check --quiet --quiet "${pip_flags[@]}")

# `compat` puts the repository root on the path of this environment: each room is importable from any folder, and a room
# that is added later needs no new setup.
"${pip[@]}" --config-settings editable_mode=compat --editable "$root[$extras]"

# procgen-mirror and gym3 pin NumPy < 2 but run on 2.4; its wheels exist for Python 3.11 and 3.12.
if [[ ",$extras," == *,coinrun,* ]]; then
    if ! "${pip[@]}" --no-deps --requirement "$root/containers/coinrun.no-deps.txt"; then
        echo "setup: CoinRun (procgen-mirror) could not be installed; it has wheels for Python 3.11 and 3.12 on Linux only." \
            "Everything but recording games works without it."
    fi
fi

gpu=${GPU:-auto}
if [[ "$gpu" == auto ]]; then
    gpu=0
    if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then gpu=1; fi
fi
if [[ "$gpu" == 1 ]]; then
    echo "setup: a GPU is here; installing the gpu extra (a source build can take many minutes; make setup GPU=0 skips it)"
    "${pip[@]}" setuptools==84.2.1 wheel ninja packaging
    if ! "${pip[@]}" --no-build-isolation --config-settings editable_mode=compat --editable "$root[gpu]"; then
        echo "setup: mamba-ssm or causal-conv1d could not be installed (they build CUDA code and need nvcc)." \
            "Everything works without them, slower on a GPU: train.log names the implementation that runs."
    fi
fi
echo "setup: ready"
