"""Stage 3 of DAgger: train the student on the teacher's labels, with LoRA on a frozen (NF4 or plain) base.

The loss is cross-entropy on the tokens of each label and the token that ends its turn, at the state where it was
given: nothing else is trained on. A state is rendered exactly as it was for acting (common/chat.py).

The T labels of a trajectory hang on prompts that are prefixes of each other. --packing tree computes every shared token
once (common/prefix_tree.py), --packing per-turn computes each sample by itself: same loss, same gradient. An optimiser
step is the labels of --batch-size trajectories, chosen before packing.

reads   --data ITER_DIR...: trajectories.jsonl and labels.jsonl of each (01_collect.py, 02_relabel.py)
writes  --out DIR: adapter_model.safetensors + adapter_config.json (PEFT), training_log.jsonl, manifest.json, log

    python 03_train.py --data runs/demo/iter_001 --out runs/demo/iter_001/adapter
    python 03_train.py --data runs/demo/iter_001 runs/demo/iter_002 --epochs 3 --out runs/demo/iter_002/adapter
    python 03_train.py --data runs/demo/iter_001 --out /tmp/look --dry-run

Not here: no packing of several GPUs, no going on in the middle of a stopped run (the same command starts it again).
"""

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import chat, jsonl, mixing, run
from common.errors import InputError


@dataclass(kw_only=True)
class Args:
    data: list[str]
    """iteration directories, each with trajectories.jsonl and labels.jsonl"""
    out: str
    """the adapter directory to write"""
    model: str = "smollm2-135m"
    """base model: smollm2-135m (embedded), a directory, or a hub id"""
    init_adapter: str | None = None
    """go on from this adapter instead of a fresh one"""
    packing: Literal["tree", "per-turn"] = "tree"
    """tree: shared tokens once; per-turn: each label with its whole prompt"""
    quant: Literal["auto", "nf4", "none"] = "auto"
    """the frozen base: nf4 is QLoRA; auto is nf4 on CUDA, none on CPU"""
    epochs: int = 3
    """passes over the data"""
    lr: float = 1e-3
    """peak learning rate of AdamW"""
    warmup: float = 0.05
    """share of the steps in which the learning rate rises; then it falls linearly to 0"""
    batch_size: int = 4
    """trajectories in an optimiser step"""
    tokens_per_batch: int = 2048
    """rows, padding included, in one forward pass; sizes the micro-batches inside a step"""
    max_context: int = 2048
    """labels whose prompt and label are longer than this many tokens are left out and counted"""
    max_steps: int | None = None
    """stop after this many optimiser steps"""
    loss_norm: Literal["token", "label"] = "token"
    """the loss of a step is the mean over its label tokens, or over its labels"""
    lora_rank: int = 16
    """rank r of LoRA on all linear layers"""
    lora_alpha: int = 32
    """scale of LoRA, alpha / r"""
    clip: float = 1.0
    """largest norm of the gradient"""
    checkpointing: Literal["auto", "none", "on", "offload"] = "auto"
    """compute activations again in the backward pass (auto: on CUDA); offload keeps checkpoints in host memory"""
    seed: int = 0
    """seed of the LoRA weights and of the order of trajectories"""
    dry_run: bool = False
    """one pass over the data without an optimiser step: prints loss, tokens and memory, writes no adapter"""
    overwrite: bool = False
    """start again, whatever is there"""


# ---------------------------------------------------------------- what is trained on


def read_labels(directories: list[str]) -> list[dict]:
    """One dict for each trajectory that has valid labels: trajectory_id, messages, labels [(turn, text)], kwargs.

    Raises InputError where a label names a trajectory or a turn that is not there, or where no label is valid.
    """
    found, invalid = [], 0
    for directory in directories:
        trajectories = {}
        for number, record in enumerate(jsonl.read(Path(directory) / "trajectories.jsonl", "trajectory"), start=1):
            if record["trajectory_id"] in trajectories:
                raise InputError(f"{directory}/trajectories.jsonl:{number}: {record['trajectory_id']} is there twice")
            extra = (record["student"] or {}).get("extra") or {}
            trajectories[record["trajectory_id"]] = {
                "trajectory_id": record["trajectory_id"],
                "messages": record["messages"],
                "places": {m["turn"]: i for i, m in enumerate(record["messages"]) if m["role"] == "assistant"},
                "labels": {},
                "template_kwargs": extra.get("chat_template_kwargs"),
            }
        path = Path(directory) / "labels.jsonl"
        for number, label in enumerate(jsonl.read(path, "label"), start=1):
            where = f"{path}:{number}: label of {label['trajectory_id']}, turn {label['turn']}"
            trajectory = trajectories.get(label["trajectory_id"])
            if trajectory is None:
                raise InputError(f"{where}: {directory}/trajectories.jsonl has no such trajectory; these two files do "
                                 "not belong together: run 02_relabel.py on this trajectories.jsonl")
            if label["turn"] not in trajectory["places"]:
                raise InputError(f"{where}: the trajectory has {len(trajectory['places'])} turns, counted from 0; run "
                                 "02_relabel.py on this trajectories.jsonl")
            if label["turn"] in trajectory["labels"]:
                raise InputError(f"{where}: this state is labelled twice; run 02_relabel.py --overwrite")
            if label["valid"]:
                trajectory["labels"][label["turn"]] = label["label"]
            else:
                invalid += 1
        found += [trajectory for trajectory in trajectories.values() if trajectory["labels"]]
    if not found:
        raise InputError(f"no valid label in {' '.join(directories)} ({invalid} invalid ones): nothing to train on")
    return found


def template_kwargs(trajectories: list[dict]) -> dict:
    """The chat template arguments that the student acted with: training must render as acting did."""
    kinds = {json.dumps(t["template_kwargs"], sort_keys=True) for t in trajectories if t["template_kwargs"] is not None}
    if len(kinds) > 1:
        raise InputError(f"students acted with different chat template arguments: {' and '.join(sorted(kinds))}; train "
                         "on data of one kind")
    return json.loads(kinds.pop()) if kinds else {}


def make_samples(trajectory: dict, tokenizer, kwargs: dict, max_context: int) -> tuple[list, int]:
    """(samples, labels left out): each label at its state, the messages before the turn that was taken there."""
    import numpy as np

    from common.prefix_tree import Sample

    samples, too_long = [], 0
    for turn, label in sorted(trajectory["labels"].items()):
        state = trajectory["messages"][: trajectory["places"][turn]]
        ids, n_prompt = chat.sample(tokenizer, state, label, kwargs)
        if len(ids) > max_context:
            too_long += 1
            continue
        name = f"the label of {trajectory['trajectory_id']}, turn {turn},"
        samples.append(Sample(name, np.array(ids, np.int32), n_prompt))
    return samples, too_long


# ---------------------------------------------------------------- the loss and the steps


LOGITS = 2**24  # how many logits there are at once: 64 MB of fp32


def token_weights(samples: list, loss_norm: str) -> list[float]:
    """The weight of every trained token of each sample, such that the loss of the step is a weighted sum."""
    if loss_norm == "token":
        return [1 / sum(sample.n_label for sample in samples)] * len(samples)
    return [1 / (len(samples) * sample.n_label) for sample in samples]


def accumulate(base, batch, backward: bool = True, offload: bool = False) -> float:
    """Add the gradient of one batch; returns the sum of -log p over its label tokens.

    Logits exist for label rows alone and for a chunk of them at a time: each chunk's gradient goes back to the hidden
    states, and these go back through the transformer once.
    """
    import torch

    from common import training

    head = base.get_output_embeddings()
    hidden = training.hidden_rows(base, batch, offload)  # (P, H)
    targets = torch.from_numpy(batch.targets).to(hidden.device)
    weights = torch.from_numpy(batch.weights).to(hidden.device)
    chunk = max(1, LOGITS // head.weight.shape[0])
    total, gradients = 0.0, []
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        leaf = hidden.detach()[part].requires_grad_(backward)
        with training.autocast(hidden.device):
            logits = head(leaf.to(head.weight.dtype))
        loss = torch.nn.functional.cross_entropy(logits.float(), targets[part], reduction="none")
        if backward:
            (loss * weights[part]).sum().backward()
            gradients.append(leaf.grad)
        total += loss.detach().sum().item()
    if backward:
        hidden.backward(torch.cat(gradients))
    return total


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak for step = 0, 1, ...: up in a straight line, then down to 0 after the last step."""
    rise = round(warmup * steps)
    return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)


def plan(n: int, batch_size: int, epochs: int, max_steps: int | None, seed: int) -> list[tuple[int, list[int]]]:
    """(epoch, trajectories) of every optimiser step; epochs count from 1. Depends on nothing but its arguments."""
    steps = []
    for epoch in range(1, epochs + 1):
        order = list(range(n))
        random.Random(mixing.derive("train", seed, epoch)).shuffle(order)
        steps += [(epoch, order[start : start + batch_size]) for start in range(0, n, batch_size)]
    return steps[:max_steps]


# ---------------------------------------------------------------- the run


def work(args: Args) -> None:
    check(args)
    out = Path(args.out)
    same = {k: v for k, v in vars(args).items() if k not in ("out", "data", "init_adapter", "overwrite", "dry_run")}
    same["inputs"] = [run.hash_file(Path(directory) / name)
                      for directory in args.data for name in ("trajectories.jsonl", "labels.jsonl")]
    if args.init_adapter:
        from common import training

        training.check_adapter(args.init_adapter, args.model)
        same["init_adapter"] = run.hash_file(Path(args.init_adapter) / "adapter_model.safetensors")
    # A new output is begun only when its input has proved good: a mistake leaves nothing that the next try runs into.
    begun = (out / "manifest.json").exists() and not args.overwrite and not args.dry_run
    if begun and (stage := run.Stage(args.out, args, same, directory=True)).done:
        stage.say_done()
        return
    started = time.time()
    data, too_long = prepare_data(args)
    model, quant = prepare_model(args, longest=max(len(sample.ids) for samples in data for sample in samples))
    if not begun and not args.dry_run:
        stage = run.Stage(args.out, args, same, directory=True, overwrite=args.overwrite)
    if not args.dry_run:
        stage.log.info("%d labels of %d trajectories; %d were longer than --max-context",
                       sum(map(len, data)), len(data), too_long)
    trained = train(args, data, model, None if args.dry_run else out)

    from common import prefix_tree, training

    summary = {
        "labels": sum(len(samples) for samples in data),
        "loss": trained["loss"],
        "tokens_distinct": sum(prefix_tree.distinct_tokens(samples) for samples in data),
        "tokens_computed": trained["rows"],
        "steps": trained["steps"],
        "seconds": time.time() - started,
        "labels_too_long": too_long,
        "quant": quant,
        "peak_memory_mb": round(training.peak_memory_mb(), 1),
    }
    run.print_summary(summary) if args.dry_run else stage.finish(summary)


def check(args: Args) -> None:
    for name in ("epochs", "lr", "batch_size", "tokens_per_batch", "max_context", "lora_rank", "lora_alpha", "clip"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be more than 0")
    if args.max_steps is not None and args.max_steps < 1:
        raise InputError(f"--max-steps {args.max_steps}: must be more than 0")
    if not 0 <= args.warmup < 1:
        raise InputError(f"--warmup {args.warmup}: must be at least 0 and less than 1")


def prepare_data(args: Args) -> tuple[list[list], int]:
    """(the samples of each trajectory that has any, labels left out for their length); prints one sample."""
    from common import prefix_tree, training

    trajectories = read_labels(args.data)
    kwargs = template_kwargs(trajectories)
    tokenizer = training.load_tokenizer(args.model)
    data, too_long = [], 0
    for trajectory in trajectories:
        samples, dropped = make_samples(trajectory, tokenizer, kwargs, args.max_context)
        too_long += dropped
        if samples:
            data.append(samples)
    if not data:
        raise InputError(f"every label is longer than --max-context {args.max_context}: nothing to train on")
    if too_long:
        print(f"{too_long} labels are longer than --max-context {args.max_context} and left out", file=sys.stderr)
    prefix_tree.refuse_long([sample for samples in data for sample in samples], args.tokens_per_batch)
    chat.show(tokenizer, data[0][-1].ids.tolist(), data[0][-1].n_prompt)
    return data, too_long


def prepare_model(args: Args, longest: int) -> tuple:
    """(frozen base with LoRA on it, in training mode; nf4 or none)."""
    from common import training

    cuda = training.device_name() == "cuda"
    quant = args.quant if args.quant != "auto" else ("nf4" if cuda else "none")
    checkpointing = args.checkpointing if args.checkpointing != "auto" else ("on" if cuda else "none")
    base = training.load_base(args.model, quant, tree=args.packing == "tree")
    training.probe(base, args.packing == "tree", longest)
    model = training.add_lora(base, args.model, args.init_adapter, args.lora_rank, args.lora_alpha, args.seed)
    training.checkpointing(model, checkpointing)
    return model, quant


def train(args: Args, data: list[list], model, out: Path | None) -> dict:
    """Train and save the adapter into `out`; without `out`, one pass without an optimiser step.

    Returns loss (mean per label token of the last epoch), rows (given to the model), steps (of the optimiser).
    """
    import torch
    from tqdm import tqdm

    from common import prefix_tree, training

    base = model.get_base_model()
    attention = training.attention_cost(base)
    steps = plan(len(data), args.batch_size, args.epochs if out else 1, args.max_steps if out else None, args.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    if out:
        training.remove_adapter(out)  # of an earlier run: the manifest no longer speaks of it
    log = open(out / "training_log.jsonl", "w", encoding="utf-8") if out else None
    bar = tqdm(total=len(steps), unit="step", desc="train" if out else "dry run", dynamic_ncols=True)
    computed, of_epoch = 0, {}  # rows so far; epoch -> [sum of -log p, label tokens]
    for number, (epoch, chosen) in enumerate(steps):
        begun = time.time()
        samples = [sample for i in chosen for sample in data[i]]
        weights = token_weights(samples, args.loss_norm)
        if args.packing == "tree":
            batches = prefix_tree.pack_tree(samples, weights, args.tokens_per_batch, attention)
        else:
            batches = prefix_tree.pack_per_turn(samples, weights, args.tokens_per_batch)
        nll = sum(accumulate(base, batch, offload=args.checkpointing == "offload") for batch in batches)
        rows = sum(batch.n_rows for batch in batches)
        label_tokens = sum(sample.n_label for sample in samples)
        sums = of_epoch.setdefault(epoch, [0.0, 0])
        sums[0], sums[1], computed = sums[0] + nll, sums[1] + label_tokens, computed + rows
        if out:
            rate = args.lr * learning_rate(number, len(steps), args.warmup)
            for group in optimiser.param_groups:
                group["lr"] = rate
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seconds = time.time() - begun
        bar.update()
        bar.set_postfix(loss=f"{nll / label_tokens:.4f}", tokens_s=f"{rows / seconds:.0f}")
        if out:
            line = {"step": number + 1, "epoch": epoch, "loss": nll / label_tokens, "lr": rate, "grad_norm": norm,
                    "label_tokens": label_tokens, "rows": rows, "seconds": round(seconds, 3),
                    "peak_memory_mb": round(training.peak_memory_mb(), 1)}  # fmt: skip
            print(json.dumps(line), file=log, flush=True)
    bar.close()
    if out:
        training.save_adapter(model, out)  # before anything else is done with it
        log.close()
    nll, label_tokens = of_epoch[max(of_epoch)]
    return {"loss": nll / label_tokens, "rows": computed, "steps": len(steps) if out else 0}


if __name__ == "__main__":
    run.main(Args, work)
