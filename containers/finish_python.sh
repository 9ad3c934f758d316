# What follows an installation of Python packages: sh finish_python.sh [FOLDER], a folder whose files end in site-packages.
set -eu
packages=/opt/venv/lib/python3.11/site-packages
folder=${1:-$packages}
cd "$folder"
# What wheels bring and nothing here can run: programs that test torch's C++, static libraries of a profiler. 0.2 GB.
rm -rf torch/test triton/backends/nvidia/lib/cupti/*.a
if [ -d torch/bin ]; then find torch/bin -type f ! -name torch_shm_manager -delete; fi
# uv and what it leaves.
rm -rf /tmp/installer /tmp/uv-*.lock
# Compiled by hash, not by date, with one order of sets, so that two builds agree; but for what another Python's syntax needs.
PYTHONHASHSEED=0 /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash -x 'py312_intrinsics' \
    -s "$folder" -p "$packages" "$folder"
