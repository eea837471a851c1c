"""What the student makes of the teacher's labels: -log p of each, under the model as it is or as it was when it collected.

This is how covariate shift is measured (common/metrics.py): the same model on states that the teacher alone brought
about, and on states with turns of the student in their history. Forward passes alone, nothing is trained here.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from common import prefix_tree, training
from common.errors import InputError
from common.hf_policy import hash_adapter
from common.training_data import Labelled


def token_losses(base: Any, batch: prefix_tree.Batch, head_rows: int) -> np.ndarray:
    """(P,) -log p of the label tokens of a batch, the logits of `head_rows` of them at a time. No gradient."""
    import torch

    head, found = base.get_output_embeddings(), []
    with torch.no_grad():
        hidden = training.hidden_rows(base, batch)  # (P, H)
        targets = torch.from_numpy(batch.targets).to(hidden.device)
        for start in range(0, len(targets), head_rows):
            part = slice(start, start + head_rows)
            with training.autocast(hidden.device):
                logits = head(hidden[part].to(head.weight.dtype))
            found.append(torch.nn.functional.cross_entropy(logits.float(), targets[part], reduction="none"))
    return torch.cat(found).cpu().numpy()


def label_nll(model: Any, data: list[Labelled], tree: bool, max_rows: int, head_rows: int, processes) -> tuple | None:
    """([sum of -log p of each label, by trajectory and turn], rows given to the model); None where a process ran out of
    the GPU's memory. max_rows: in one forward pass; head_rows: see token_losses."""
    from tqdm import tqdm

    base = model.get_base_model()
    attention = training.attention_cost(base)
    sums, rows, full, loads = [], 0.0, False, [0.0] * processes.size
    bar = tqdm(data, unit="trajectory", desc="measure", dynamic_ncols=True, leave=False, disable=not processes.first)
    for one in bar:
        samples = one.samples.samples()
        numbers = list(range(len(samples)))  # for weights: so each predicted token says whose it is
        batches = (prefix_tree.pack_tree(samples, numbers, max_rows, attention) if tree
                   else prefix_tree.pack_per_turn(samples, numbers, max_rows))
        sums.append(np.zeros(len(samples)))
        try:
            for batch in [] if full else processes.share(batches, attention, loads):
                np.add.at(sums[-1], batch.weights.astype(int), token_losses(base, batch, head_rows))
                rows += training.rows_computed(base, batch)
        except RuntimeError as error:
            if not training.out_of_memory(error):
                raise
            print("warning: out of memory: the loss of single labels is not measured (a smaller --tokens-per-batch may do)",
                  file=sys.stderr)
            full = True
    # every process gets here, or the others would wait for ever
    flat = processes.total([number for of in sums for number in of.tolist()] + [rows, float(full)])
    if flat.pop():
        return None
    rows, cuts = flat.pop(), np.cumsum([len(of) for of in sums])[:-1]
    return [part.tolist() for part in np.split(np.array(flat), cuts)], int(rows)


def mean_loss(data: list[Labelled], sums: list[list[float]]) -> float:
    """Mean of -log p over the label tokens."""
    return sum(map(sum, sums)) / count_tokens(data)


def count_tokens(data: list[Labelled]) -> int:
    """Label tokens."""
    return sum(sample.n_label for one in data for sample in one.samples.samples())


@contextlib.contextmanager
def as_collected(model: Any, base: str, student: dict | None, init_adapter: str | None):
    """The model with the adapter of the student that collected; yields False where it is not to be had.

    The base stays the one that is trained on: in NF4 it is not quite what a student on the plain base had.

    With aggregated labels training starts from a fresh adapter, but who collected them last had a trained one. Without
    a recorded student it is the model that training starts from. What weights an openai: student had nobody knows here.
    base: the name of the base model that is trained.
    """
    kind, _, name = ((student or {}).get("model") or "").partition(":")
    known = student is None or (kind in ("hf", "vllm") and Path(name).name == Path(base).name)
    adapter = student and student.get("adapter")
    if not known:
        yield False
    elif student is None or (adapter is None and init_adapter is None):
        yield True
    elif adapter is None:
        with model.disable_adapter():
            yield True
    elif init_adapter and hash_adapter(init_adapter) == student["adapter_hash"]:
        yield True
    else:
        with _weights_of(model, adapter, student["adapter_hash"]) as loaded:
            yield loaded


@contextlib.contextmanager
def _weights_of(model: Any, adapter: str, adapter_hash: str | None):
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    own = {name: weight.clone() for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    try:
        if not Path(adapter).is_dir() or hash_adapter(adapter) != adapter_hash:
            raise InputError(f"{adapter} is not there any more, or is another one now")
        config, mine = json.loads((Path(adapter) / "adapter_config.json").read_text()), model.peft_config["default"]
        if (config["r"], config["lora_alpha"]) != (mine.r, mine.lora_alpha):
            raise InputError(f"{adapter} has another rank or alpha")
        set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"))
        loaded = True
    except (InputError, RuntimeError, OSError, KeyError, ValueError) as error:
        print(f"warning: the loss before training is not measured, the student that collected cannot be loaded: {error}",
              file=sys.stderr)
        loaded = False
    try:
        yield loaded
    finally:
        with torch.no_grad():
            set_peft_model_state_dict(model, own)


def lines(data: list[Labelled], before: list[list[float]] | None, after: list[list[float]] | None) -> list[dict]:
    """One line per measured label, means per label token; None for what was not measured."""
    found = []
    for place, one in enumerate(data):
        for number, (turn, sample) in enumerate(zip(one.samples.turns, one.samples.samples())):
            means = {name: sums and sums[place][number] / sample.n_label for name, sums in (("before", before), ("after", after))}
            found.append({"trajectory_id": one.samples.name, "instance_id": one.instance_id, "iteration": one.iteration,
                          "turn": turn, "tokens": sample.n_label, "student_turns": one.student_turns[turn], **means})
    return found
