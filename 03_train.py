"""Stage 3 of DAgger: train the student on the teacher's labels, with LoRA on a frozen (NF4 or plain) base.

The loss is cross-entropy on the tokens of each label and the token that ends its turn, at the state where it was
given: nothing else is trained on. A state is rendered exactly as it was for acting (common/chat.py).

The T labels of a trajectory hang on prompts that are prefixes of each other. --packing tree computes every shared token
once (common/prefix_tree.py), --packing per-turn computes each sample by itself: same loss, same gradient. An optimiser
step is the labels of --batch-size trajectories, chosen before packing.

reads   --data ITER_DIR...: trajectories.jsonl and labels.jsonl of each (01_collect.py, 02_relabel.py)
writes  --out DIR: adapter_model.safetensors + adapter_config.json (PEFT), training_log.jsonl, manifest.json, log,
        label_nll.jsonl (what the student made of some of the newest labels, before training and after); while it trains
        also state.pt, from which a stopped run goes on

    python 03_train.py --data runs/demo/iter_001 --out runs/demo/iter_001/adapter
    python 03_train.py --data runs/demo/iter_001 runs/demo/iter_002 --epochs 3 --out runs/demo/iter_002/adapter
    python 03_train.py --data runs/demo/iter_001 --out /tmp/look --dry-run
    torchrun --nproc-per-node 4 03_train.py --data runs/demo/iter_001 --out runs/demo/iter_001/adapter

With torchrun every process holds the whole model and takes its share of the rows of each step (data parallel).
--keep resolved trains on trajectories that resolved their task alone (rejection sampling): 04_eval.py --trajectories
grades them into ITER_DIR/grades first. An adapter trained on an NF4 base is served on the plain one (vLLM): at the end its
loss is measured under both, on the same labels (loss_nf4, loss_plain in the summary). Not here: models that are too large
for one GPU.
"""

import dataclasses
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import jsonl, mixing, models, run, stage_tools
from common.errors import InputError, StageError


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
    steps_per_epoch: int | None = None
    """cut each pass over the data into this many steps of nearly equally many trajectories, instead of --batch-size:
    arms whose trajectories differ in length take the same number of steps"""
    tokens_per_batch: int = 2048
    """rows, padding included, in one forward pass; sizes the micro-batches inside a step"""
    max_context: int = 2048
    """labels whose prompt and label are longer than this many tokens are left out and counted"""
    max_steps: int | None = None
    """stop after this many optimiser steps"""
    loss_norm: Literal["token", "label"] = "token"
    """the loss of a step is the mean over its label tokens, or over its labels"""
    keep: Literal["all", "resolved"] = "all"
    """resolved: only trajectories that ITER_DIR/grades/results.jsonl says resolved their task"""
    lora_rank: int = 16
    """rank r of LoRA on all linear layers"""
    lora_alpha: int = 32
    """scale of LoRA, alpha / r"""
    clip: float = 1.0
    """largest norm of the gradient"""
    checkpointing: Literal["auto", "none", "on", "offload"] = "auto"
    """compute activations again in the backward pass (auto: on CUDA); offload keeps checkpoints in host memory"""
    save_every: float = 120
    """seconds between saves of the optimiser's state, from which a stopped run goes on (0: after every step)"""
    seed: int = 0
    """seed of the LoRA weights and of the order of trajectories"""
    measure: int = 32
    """measure the loss of each label of this many trajectories of the last --data directory, before training (under the
    adapter that collected them, on the base that is trained on) and after; 0: none"""
    dry_run: bool = False
    """one pass over the data without an optimiser step: prints loss, tokens and memory, writes no adapter"""
    label_nll: str | None = None
    """with --dry-run: write the loss of every label to this file, and compute no gradient"""
    overwrite: bool = False
    """start again, whatever is there"""


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


def plan(n: int, batch_size: int, epochs: int, max_steps: int | None, seed: int,
         steps_per_epoch: int | None = None) -> list[tuple[int, list[int]]]:
    """(epoch, trajectories) of every optimiser step; epochs count from 1. Depends on nothing but its arguments."""
    if steps_per_epoch:
        starts = [n * step // steps_per_epoch for step in range(steps_per_epoch)] + [n]
    else:
        starts = [*range(0, n, batch_size), n]
    steps = []
    for epoch in range(1, epochs + 1):
        order = list(range(n))
        random.Random(mixing.derive("train", seed, epoch)).shuffle(order)
        steps += [(epoch, order[start:stop]) for start, stop in zip(starts, starts[1:])]
    return steps[:max_steps]


# ---------------------------------------------------------------- the run


def work(args: Args) -> None:
    check(args)
    out = Path(args.out)
    how = ("out", "data", "init_adapter", "overwrite", "dry_run", "save_every", "measure", "label_nll", "tokens_per_batch",
           "checkpointing")  # fmt: skip
    same = {name: value for name, value in vars(args).items() if name not in how and (name, value) != ("keep", "all")}
    same["inputs"] = [run.hash_file(Path(directory) / name)
                      for directory in args.data for name in ("trajectories.jsonl", "labels.jsonl")]
    if args.keep == "resolved":
        for directory in args.data:
            stage_tools.grades_of(Path(directory) / "trajectories.jsonl")
        same["grades"] = [run.hash_file(Path(directory) / "grades/results.jsonl") for directory in args.data]
    from common import label_loss, prefix_tree, training, training_data, training_files

    if args.init_adapter:
        models.check_adapter(args.init_adapter, args.model)
        same["init_adapter"] = run.hash_file(Path(args.init_adapter) / "adapter_model.safetensors")
    processes = training.Processes()  # one, or those of torchrun; the first one writes
    stage = None
    # A new output is begun only when its input has proved good: a mistake leaves nothing that the next try runs into.
    begun = (out / "manifest.json").exists() and not args.overwrite and not args.dry_run
    if begun and processes.first:
        training_files.lock(out)
        stage = run.Stage(args.out, args, same, directory=True)
    if processes.agree(stage is not None and stage.done):
        if stage:
            (out / training_files.LOCK).unlink()
            stage.say_done()
        processes.close()
        return
    started = time.time()
    data, too_long = training_data.prepare(args.data, args.keep, args.model, args.max_context, say=processes.first)
    if args.steps_per_epoch and args.steps_per_epoch > len(data):
        raise InputError(f"--steps-per-epoch {args.steps_per_epoch}: there are only {len(data)} trajectories to share out")
    longest = max((one.samples for one in data), key=lambda of: of.longest)
    prefix_tree.refuse_long(longest.samples(), args.tokens_per_batch)
    model, quant = prepare_model(args, longest.longest)
    if processes.first and not args.dry_run:
        if not begun:
            training_files.lock(out)
            stage = run.Stage(args.out, args, same, directory=True, overwrite=args.overwrite)
            training_files.forget(out)
        stage.log.info("%d labels of %d trajectories; %d were longer than --max-context",
                       sum(len(one.samples) for one in data), len(data), too_long)
    processes.agree(True)  # the others wait until the output is begun
    measured = [] if args.dry_run else choose_measured(args, data)
    before = measure_before(args, measured, model, processes)
    if args.label_nll:
        trained = only_measure(args, data, model, processes)
    else:
        trained = train(args, data, model, None if args.dry_run else out, processes)
    after = measure(args, measured, model, processes)
    if measured and processes.first:
        jsonl.write_atomically(out / "label_nll.jsonl", as_lines(label_loss.lines(measured, before, after and after[0])))

    summary = {
        "labels": sum(len(one.samples) for one in data),
        "loss": trained["loss"],
        "tokens_distinct": sum(prefix_tree.distinct_tokens(one.samples.samples()) for one in data),
        "tokens_computed": trained["rows"],
        "steps": trained["steps"],
        "seconds": time.time() - started + trained["seconds_before"],
        "labels_too_long": too_long,
        "quant": quant,
        "processes": processes.size,
        "peak_memory_mb": round(training.peak_memory_mb(), 1),
    }
    if quant == "nf4" and measured:
        parameters = model.get_base_model().num_parameters()
        summary["gap_label_tokens"] = label_loss.count_tokens(measured)
        summary["loss_nf4"] = after and label_loss.mean_loss(measured, after[0])
        del model  # both at once may not fit; `measure` has waited for the first process, so the adapter is there
        summary["loss_plain"] = plain_loss(args, measured, parameters, processes)
        if processes.first:
            say_gap(summary)
    if args.dry_run and processes.first:
        run.print_summary(summary)
    elif processes.first:
        stage.before = trained["seconds_before"]
        stage.finish(summary)
        training_files.forget(out)
        (out / training_files.LOCK).unlink()
    processes.close()


def check(args: Args) -> None:
    for name in ("epochs", "lr", "batch_size", "tokens_per_batch", "max_context", "lora_rank", "lora_alpha", "clip"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be more than 0")
    for name in ("max_steps", "steps_per_epoch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be more than 0")
    if args.measure < 0:
        raise InputError(f"--measure {args.measure}: must be at least 0")
    if args.label_nll and not args.dry_run:
        raise InputError("--label-nll goes with --dry-run; a training run writes label_nll.jsonl into its --out")
    if args.label_nll and not Path(args.label_nll).parent.is_dir():
        raise InputError(f"--label-nll {args.label_nll}: there is no directory {Path(args.label_nll).parent}")
    if not 0 <= args.warmup < 1:
        raise InputError(f"--warmup {args.warmup}: must be at least 0 and less than 1")


def prepare_model(args: Args, longest: int) -> tuple:
    """(frozen base with LoRA on it, in training mode; nf4 or none)."""
    from common import training

    cuda = models.device_name() == "cuda"
    quant = args.quant if args.quant != "auto" else ("nf4" if cuda else "none")
    checkpointing = args.checkpointing if args.checkpointing != "auto" else ("on" if cuda else "none")
    base = training.load_base(args.model, quant, tree=args.packing == "tree")
    training.probe(base, args.packing == "tree", longest)
    model = training.add_lora(base, args.model, args.init_adapter, args.lora_rank, args.lora_alpha, args.seed)
    training.checkpointing(model, checkpointing)
    return model, quant


def choose_measured(args: Args, data: list) -> list:
    """--measure trajectories of the last --data directory, drawn by the seed, in their order."""
    newest = [place for place, one in enumerate(data) if one.directory == args.data[-1]]
    chosen = random.Random(mixing.derive("measure", args.seed)).sample(newest, min(args.measure, len(newest)))
    return [data[place] for place in sorted(chosen)]


def only_measure(args: Args, data: list, model, processes) -> dict:
    """Write the loss of every label to --label-nll; returns what `train` does."""
    from common import label_loss

    found = measure(args, data, model, processes)
    if found is None:
        raise StageError("out of the GPU's memory: lower --tokens-per-batch")
    if processes.first:
        jsonl.write_atomically(Path(args.label_nll), as_lines(label_loss.lines(data, found[0], None)))
    return {"loss": label_loss.mean_loss(data, found[0]), "rows": found[1], "steps": 0, "seconds_before": 0.0}


def as_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def train(args: Args, data: list, model, out: Path | None, processes) -> dict:
    """Train and save the adapter into `out`; without `out`, one pass without an optimiser step.

    Returns loss (mean per label token of the last epoch), rows (given to the model), steps (of the optimiser),
    seconds_before (that earlier calls took whose state this one took up).
    """
    import torch
    from tqdm import tqdm

    from common import training, training_files

    base = model.get_base_model()
    attention = training.attention_cost(base)
    steps = plan(len(data), args.batch_size, args.epochs if out else 1, args.max_steps if out else None, args.seed,
                 args.steps_per_epoch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    count = {"steps": 0, "rows": 0, "seconds": 0.0, "epochs": {}}  # epoch -> [sum of -log p, label tokens]
    if out:
        count = training_files.load_state(out, parameters, optimiser) or count
    seconds_before, began, saved = count["seconds"], time.time(), time.time()
    log = training_files.open_log(out, count["steps"]) if out and processes.first else None
    bar = tqdm(total=len(steps), initial=count["steps"], unit="step", desc="train" if out else "dry run",
               dynamic_ncols=True, disable=not processes.first)
    for number, (epoch, chosen) in enumerate(steps[count["steps"] :], count["steps"]):
        begun = time.time()
        samples = [sample for i in chosen for sample in data[i].samples.samples()]
        mine = processes.share(pack(args, samples, attention, processes.size), attention)
        try:
            nll = sum(accumulate(base, batch, offload=args.checkpointing == "offload") for batch in mine)
        except RuntimeError as error:
            if not training.out_of_memory(error):
                raise
            raise StageError(f"out of memory in step {number + 1}: lower --tokens-per-batch (it is {args.tokens_per_batch}), "
                             "or take --checkpointing offload; what was saved goes on") from error  # fmt: skip
        nll, rows = processes.total([nll, sum(training.rows_computed(base, batch) for batch in mine)])
        processes.add_gradients(parameters)
        label_tokens = sum(sample.n_label for sample in samples)
        if not math.isfinite(nll):
            raise StageError(f"the loss of step {number + 1} is {nll}: training diverged; lower --lr (it is {args.lr:g}) or "
                             "raise --warmup, and give --overwrite")
        sums = count["epochs"].setdefault(epoch, [0.0, 0])
        sums[0], sums[1], count["rows"] = sums[0] + nll, sums[1] + label_tokens, count["rows"] + int(rows)
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
        if log:
            line = {"step": number + 1, "epoch": epoch, "loss": nll / label_tokens, "lr": rate, "grad_norm": norm,
                    "label_tokens": label_tokens, "rows": int(rows), "seconds": round(seconds, 3),
                    "peak_memory_mb": round(training.peak_memory_mb(), 1)}  # fmt: skip
            print(json.dumps(line), file=log, flush=True)
            count |= {"steps": number + 1, "seconds": seconds_before + time.time() - began}
            if number + 1 == len(steps) or time.time() - saved >= args.save_every:
                training_files.save_state(out, parameters, optimiser, count)
                saved = time.time()
    bar.close()
    if log:
        training_files.save_adapter(model, out)  # before anything else is done with it
        log.close()
    nll, label_tokens = count["epochs"][max(count["epochs"])]
    return {"loss": nll / label_tokens, "rows": count["rows"], "steps": len(steps) if out else 0,
            "seconds_before": seconds_before}


def pack(args: Args, samples: list, attention: float, processes: int) -> list:
    """The micro-batches of one optimiser step; with several processes small enough that each gets its share."""
    from common import prefix_tree

    tree, limit = args.packing == "tree", args.tokens_per_batch
    if processes > 1:
        tokens = prefix_tree.distinct_tokens(samples) if tree else sum(len(sample.ids) for sample in samples)
        limit = min(limit, max(-(-tokens // processes), *(len(sample.ids) for sample in samples)))
    weights = token_weights(samples, args.loss_norm)
    if tree:
        return prefix_tree.pack_tree(samples, weights, limit, attention)
    return prefix_tree.pack_per_turn(samples, weights, limit)


# ---------------------------------------------------------------- what the student makes of the labels


def measure(args: Args, data: list, model, processes) -> tuple | None:
    """label_loss.label_nll with the settings of this run; None with nothing to measure."""
    from common import label_loss

    head_rows = max(1, LOGITS // model.get_base_model().get_output_embeddings().weight.shape[0])
    tree = args.packing == "tree"
    return label_loss.label_nll(model, data, tree, args.tokens_per_batch, head_rows, processes) if data else None


def measure_before(args: Args, data: list, model, processes) -> list | None:
    """-log p of the labels under the student that collected these trajectories; None where it is not to be had."""
    from common import label_loss

    with label_loss.as_collected(model, args.model, data[0].student if data else None, args.init_adapter) as loaded:
        found = measure(args, data, model, processes) if loaded else None
    return found and found[0]


def plain_loss(args: Args, data: list, parameters: int, processes) -> float | None:
    """Mean label loss of the adapter in --out on the plain base; None where that could not be loaded, and says why."""
    from common import label_loss, training

    longest, model = max(one.samples.longest for one in data), None
    plain = dataclasses.replace(args, quant="none", init_adapter=args.out, checkpointing="none")
    why = "it does not fit into memory"
    if training.room_for_plain(parameters):
        try:
            model, _ = prepare_model(plain, longest)
        except RuntimeError as error:  # the adapter is saved: no reason to fail
            why = str(error)
    if model is None:
        print(f"warning: the plain base could not be loaded: {why}", file=sys.stderr)
    missing = processes.total([float(model is None)])[0]
    found = None if missing else measure(args, data, model, processes)
    return found and label_loss.mean_loss(data, found[0])


def say_gap(found: dict) -> None:
    nf4, plain = ("not measured" if found[name] is None else f"{found[name]:.4f}"
                  for name in ("loss_nf4", "loss_plain"))  # fmt: skip
    print(f"label loss of the adapter on its NF4 base: {nf4}; on the plain base, as vLLM serves it: {plain} "
          f"({found['gap_label_tokens']} label tokens)", file=sys.stderr)


if __name__ == "__main__":
    run.main(Args, work)
