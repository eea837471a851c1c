"""The files of a training in its directory: the adapter, the state that a stopped run goes on from, the log, the lock."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from common.errors import InputError

LOCK = ".lock"  # while it is trained


def save_adapter(peft_model: Any, out: Path) -> None:
    """Write the adapter into `out`. Its files are finished elsewhere and moved in; adapter_config.json comes last."""
    half = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    try:
        # save_embedding_layers: "auto" would ask the hub whether the vocabulary has grown
        peft_model.save_pretrained(half, save_embedding_layers=False)
        config = json.loads((half / "adapter_config.json").read_text())
        if not isinstance(config["target_modules"], str):  # which would be a pattern, of an adapter from elsewhere
            config["target_modules"] = sorted(config["target_modules"])  # a set: in another order each time
        (half / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        remove_adapter(out)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            with open(half / name, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(half / name, out / name)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def remove_adapter(out: Path) -> None:
    """Take an adapter away such that what is left of it never looks whole."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).unlink(missing_ok=True)


def save_state(out: Path, parameters: list, optimiser: Any, count: dict) -> None:
    """Everything that a stopped run needs to go on: the trained weights, the optimiser, `count`. Whole or not there."""
    import torch

    half = out / f"state.{os.getpid()}.tmp"
    state = {"weights": [p.detach() for p in parameters], "optimiser": optimiser.state_dict(), "count": count}
    try:
        with open(half, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(half, out / "state.pt")
    finally:
        half.unlink(missing_ok=True)


def load_state(out: Path, parameters: list, optimiser: Any) -> dict | None:
    """Take up what save_state wrote and return its count; None where nothing was saved."""
    import torch

    if not (out / "state.pt").exists():
        return None
    state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for parameter, weight in zip(parameters, state["weights"], strict=True):
            parameter.copy_(weight)
    optimiser.load_state_dict(state["optimiser"])
    return state["count"]


def lock(out: Path) -> None:
    """Keep other processes from training in the directory while this one lives. Raises InputError if one is at work there."""
    out.mkdir(parents=True, exist_ok=True)
    held = os.open(out / LOCK, os.O_RDWR | os.O_CREAT)  # never closed
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{out}: another process is training there; wait for it or give another --out") from None


def forget(out: Path) -> None:
    """Remove what a stopped run would have gone on from."""
    for path in (out / "state.pt", *out.glob("state.*.tmp")):
        path.unlink(missing_ok=True)


def open_log(out: Path, steps: int) -> TextIO:
    """training_log.jsonl, to be written after the lines of the first `steps` steps. An adapter of before is gone then."""
    remove_adapter(out)  # the manifest no longer speaks of it
    (out / "label_nll.jsonl").unlink(missing_ok=True)
    path = out / "training_log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps] if steps and path.exists() else []
    log = open(path, "w", encoding="utf-8")
    log.writelines(lines)
    return log
