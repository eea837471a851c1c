"""Hand a trained student on: the adapter with a model card, base and adapter in one, or the labels for TRL.

    python -m common.export runs/laptop --format peft
    python -m common.export runs/laptop --format merged --iteration 2 --out /tmp/student
    python -m common.export runs/laptop --format trl

reads   a run of run_loop.sh: its manifests, the adapter of one iteration (by default the one that was best on the
        evaluation tasks) and, for trl, the trajectories and labels that trained it
writes  --out DIR (by default RUN/export/FORMAT) with a card, README.md, and DIR.manifest.json beside it

peft    adapter_model.safetensors and adapter_config.json as 03_train.py wrote them. hf:BASE,adapter=DIR uses it.
merged  one directory that transformers and vLLM load: hf:DIR, vllm:DIR. The weights have the type in which the base is
        stored; each is added up in fp32 and rounded once. It needs memory for the base as it is stored (4B parameters
        in bf16: 8 GB) and for its largest layer in fp32, on the CPU. An adapter that was trained on an NF4 base is
        merged into the plain one; the card says what that costs in loss where 03_train.py has measured it.
trl     train.jsonl in TRL's conversational prompt/completion form, one line for each valid label of the iterations that
        trained the adapter: with AGGREGATE=union (or a window) those in its --data, with `current` also those of the
        adapters that it went on from. Every line holds its whole history, so that the file grows with the square of
        the number of turns, where the files of a run grow with the number; it is streamed, and its size is printed.

What TRL makes of a line is what 03_train.py trains on, with these differences: TRL renders prompt and completion with
the model's chat template, so what the template puts behind the token that ends a turn is trained on, too (ChatML: a
newline); a template that puts an empty think block into the last answer but not into the generation prompt (Qwen3 with
thinking on) has it trained on; a template that strips contents (Llama 3) strips the label; and where a tokenizer joins
the last characters of a prompt with the first ones of an answer, TRL sees them joined, we apart, as the student does
when it acts. Labels that 03_train.py left out as longer than --max-context are in the file; SFTConfig(max_length=...)
decides about them.

Not here: nothing is uploaded, nothing is quantised.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cards, jsonl, models, run, table
from common.chat import THINK, harmless, special_tokens
from common.errors import InputError


@dataclass(kw_only=True)
class Args:
    format: Literal["peft", "merged", "trl"]
    """peft: the adapter; merged: base and adapter in one; trl: the labels that trained it"""
    iteration: int | None = None
    """the iteration whose adapter it is (default: the best on the evaluation tasks)"""
    out: str | None = None
    """the directory to write (default: RUN/export/FORMAT)"""
    overwrite: bool = False
    """replace an earlier export in --out"""


# ---------------------------------------------------------------- which student


@dataclass
class Student:
    """The adapter of one iteration of a run, and what trained it."""

    home: Path  # the run
    number: int
    stages: dict[int, dict[str, dict]]  # iteration -> stage -> manifest (table.read_run)
    chain: list[int]  # the iterations whose adapters followed each other to this one, which is the last
    whole: bool  # whether the first of them began from the base; else its beginning is not in this run

    @property
    def adapter(self) -> Path:
        return adapter_of(self.home, self.number)

    @property
    def settings(self) -> dict:
        return self.stages[self.number]["train"]["settings"]

    @property
    def summary(self) -> dict:
        return self.stages[self.number]["train"]["summary"]

    @property
    def model(self) -> str:
        return self.settings["model"]

    def of(self, stage: str) -> dict | None:
        """The manifest of a stage of this iteration, if that is finished."""
        return self.stages[self.number].get(stage)

    def data(self) -> list[tuple[str, dict]]:
        """(iteration directory as 03_train.py was given it, manifest of that training), oldest first, each once."""
        found = {}
        for number in self.chain:
            manifest = self.stages[number]["train"]
            for path in manifest["settings"]["data"]:
                found.setdefault(path, (path, manifest))
        return list(found.values())


def adapter_of(home: Path, number: int) -> Path:
    return home / f"iter_{number:03d}" / "adapter"


def choose(home: Path, iteration: int | None) -> Student:
    """The student of a run. Raises InputError where there is none, and where its files are not what was recorded."""
    if not home.is_dir():
        raise InputError(f"{home}: no such directory; a run is what run_loop.sh writes, as runs/laptop")
    stages = table.read_run(home, None)
    trained = [number for number, of in stages.items() if "train" in of]
    if not trained:
        raise InputError(f"{home}: no iteration of this run has a trained adapter, so there is nothing to hand on"
                         + _weightless(stages))
    if iteration is None:
        if not any("eval" in stages[number] for number in trained):
            raise InputError(f"{home}: no adapter of this run is evaluated yet; say which: --iteration "
                             f"{' or '.join(map(str, trained))}")
        iteration = table.best_iteration({number: stages[number] for number in trained})
    if iteration not in trained:
        raise InputError(f"--iteration {iteration}: {home} has adapters of {', '.join(map(str, trained))}")
    manifest, adapter = stages[iteration]["train"], adapter_of(home, iteration)
    check_adapter(adapter, manifest["settings"]["model"])
    _refuse_another_adapter(adapter, stages[iteration].get("eval"), adapter.parent / "eval")
    _refuse_another_adapter(adapter, table.tests(home).get(iteration), home / f"test/iter_{iteration:03d}")
    chain, whole = follow(home, stages, iteration)
    return Student(home, iteration, stages, chain, whole)


def _weightless(stages: dict) -> str:
    """Where the evaluated student has its weights elsewhere, that is why there is no adapter."""
    for of in stages.values():
        student = of.get("eval", {}).get("settings", {}).get("student") or ""
        if re.split("[:,]", student)[0] in ("openai", "oracle", "replay"):
            return f" (its student is {student}, whose weights are not here)"
    return ""


def check_adapter(adapter: Path, model: str) -> None:
    """InputError unless the adapter's two files are there, whole, and made for the model."""
    from safetensors import SafetensorError, safe_open

    models.check_adapter(str(adapter), model)
    weights = adapter / "adapter_model.safetensors"
    try:
        with safe_open(weights, "np") as content:
            content.keys()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights}: the adapter's weights are gone or damaged ({error}); 03_train.py --overwrite "
                         "makes them again") from None


def _refuse_another_adapter(adapter: Path, evaluated: dict | None, place: Path) -> None:
    """A card must not quote a score of other weights."""
    from common.hf_policy import hash_adapter

    recorded = ((evaluated or {}).get("same", {}).get("student") or {}).get("adapter_hash")
    if recorded and recorded != hash_adapter(str(adapter)):
        raise InputError(f"{adapter}: not the adapter that was evaluated (it was trained again since); evaluate it: "
                         f"04_eval.py --out {place} --overwrite ...")


def follow(home: Path, stages: dict, number: int) -> tuple[list[int], bool]:
    """Student.chain and Student.whole: back along --init-adapter, as long as that is an adapter of this run."""
    chain = [number]
    while start := stages[chain[0]]["train"]["settings"].get("init_adapter"):
        name = Path(start).parent.name
        before = int(name.removeprefix("iter_")) if name.removeprefix("iter_").isdigit() else None
        weights = adapter_of(home, before or 0) / "adapter_model.safetensors"
        recorded = stages[chain[0]]["train"]["same"].get("init_adapter")
        if before in chain or "train" not in stages.get(before, {}) or not weights.is_file() \
                or run.hash_file(weights) != recorded:  # fmt: skip
            return chain, False
        chain.insert(0, before)
    return chain, True


# ---------------------------------------------------------------- the three formats: each fills a directory


def write_peft(student: Student, out: Path) -> dict:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(student.adapter / name, out / name)
    return {"quant": student.summary["quant"]}


def write_merged(student: Student, out: Path) -> dict:
    """Base and adapter in one; the sum of each weight is made in fp32 and rounded once, to the type of the base."""
    import torch
    from transformers import AutoConfig

    model, quant = student.model, student.summary["quant"]
    tokenizer, _ = models.load_tokenizer(model)
    if getattr(AutoConfig.from_pretrained(models.model_path(model)), "quantization_config", None):
        raise InputError(f"{model} is stored quantised, and what is added to such weights is lost in rounding: hand on "
                         "the adapter, --format peft")
    if quant == "nf4":
        print(f"note: the adapter was trained on an NF4 base and is merged into the plain one; {cards.gap(student)}",
              file=sys.stderr)
    base = models.load_base(model, "none", dtype="auto", device_map={"": "cpu"})
    both = models.load_adapter(base, model, str(student.adapter))
    with torch.no_grad():
        merged = both.merge_and_unload()  # LoRA's matrices are fp32: weight += fp32 is computed in fp32
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"dtype": str(merged.dtype).removeprefix("torch."), "parameters": merged.num_parameters(), "quant": quant}


def write_trl(student: Student, out: Path) -> dict:
    """train.jsonl: one line per label, {"prompt": [...], "completion": [{"role": "assistant", ...}], ids}."""
    if not student.whole:
        start = student.stages[student.chain[0]]["train"]["settings"]["init_adapter"]
        raise InputError(f"{student.adapter}: it went on from {start}, which is no adapter of this run any more: what "
                         "that was trained on is not known")
    sources = [source_of(student, *data) for data in student.data()]
    tokenizer, _ = models.load_tokenizer(student.model)
    specials = [token for token in special_tokens(tokenizer) if token not in THINK]  # harmless as chat.render does it
    kwargs = template_kwargs(directory for directory, _ in sources)
    labels = 0
    with open(out / "train.jsonl", "w", encoding="utf-8") as file:
        for directory, resolved in sources:
            for line in examples(directory, resolved, specials):
                if kwargs:
                    line["chat_template_kwargs"] = kwargs
                print(json.dumps(line, ensure_ascii=False), file=file)
                labels += 1
    size = (out / "train.jsonl").stat().st_size
    files = sum((directory / name).stat().st_size for directory, _ in sources
                for name in ("trajectories.jsonl", "labels.jsonl"))  # fmt: skip
    print(f"train.jsonl: {labels} labels, {size / 1e6:.1f} MB (each with its whole history; the run's own files have "
          f"{files / 1e6:.1f} MB)", file=sys.stderr)
    return {"labels": labels, "bytes": size, "iterations": " ".join(directory.name for directory, _ in sources)}


def source_of(student: Student, path: str, manifest: dict) -> tuple[Path, set[str] | None]:
    """(the iteration directory that 03_train.py was given, the trajectories that --keep resolved left or None for all).

    Raises InputError where its files are gone or are not those that it read.
    """
    inputs = manifest["same"]["inputs"]
    for directory in (Path(path), student.home / Path(path).name):  # the run may lie elsewhere now
        files = [directory / name for name in ("trajectories.jsonl", "labels.jsonl")]
        if all(file.is_file() and run.hash_file(file) in inputs for file in files):
            break
    else:
        raise InputError(f"{student.home / Path(path).name}: trajectories.jsonl and labels.jsonl are not those that "
                         "the adapter was trained on; they are gone, or were made again since")
    if manifest["settings"].get("keep", "all") == "all":
        return directory, None
    path = directory / "grades/results.jsonl"
    if run.hash_file(path) not in manifest["same"].get("grades", [run.hash_file(path)]):
        raise InputError(f"{path}: not the grades that the adapter was trained with; they were made again since")
    graded = jsonl.read(path, "result")
    return directory, {result["trajectory_id"] for result in graded if result["resolved"]}


def template_kwargs(directories) -> dict:
    """The chat template arguments with which the student acted; 03_train.py refuses data with several kinds."""
    for directory in directories:
        for record in jsonl.read(directory / "trajectories.jsonl", "trajectory"):
            if record["student"]:
                return (record["student"].get("extra") or {}).get("chat_template_kwargs") or {}
    return {}


def examples(directory: Path, resolved: set[str] | None, specials: list[str]) -> Iterator[dict]:
    """The lines of one iteration: its valid labels, in the order of its trajectories and turns."""
    labels: dict[str, dict[int, str]] = {}
    for label in jsonl.read(directory / "labels.jsonl", "label"):
        if label["valid"]:
            labels.setdefault(label["trajectory_id"], {})[label["turn"]] = label["label"]
    for record in jsonl.read(directory / "trajectories.jsonl", "trajectory"):
        of = labels.get(record["trajectory_id"], {})
        if resolved is not None and record["trajectory_id"] not in resolved:
            continue
        messages = [{"role": m["role"], "content": harmless(m["content"], specials)} for m in record["messages"]]
        for place, message in enumerate(record["messages"]):
            if message["role"] == "assistant" and message["turn"] in of:
                completion = harmless(of[message["turn"]], specials)
                yield {
                    "prompt": messages[:place],
                    "completion": [{"role": "assistant", "content": completion}],
                    "trajectory_id": record["trajectory_id"],
                    "turn": message["turn"],
                    "iteration": record["iteration"],
                }


WRITE = {"peft": write_peft, "merged": write_merged, "trl": write_trl}


# ---------------------------------------------------------------- the command


def export(home: Path, args: Args) -> None:
    out = home / "export" / args.format if args.out is None else Path(args.out)
    if out.name in ("", ".."):
        raise InputError(f"--out {args.out!r}: give the directory to write a name of its own")
    student = choose(home, args.iteration)
    _refuse_existing(out, args.overwrite)
    half = out.with_name(f".{out.name}.half-exported")
    shutil.rmtree(half, ignore_errors=True)  # of an export that was killed
    same = {"run": str(home), "iteration": student.number, "format": args.format,
            "adapter": run.hash_file(student.adapter / "adapter_model.safetensors")}
    half.mkdir(parents=True)
    try:
        found = WRITE[args.format](student, half)
        if args.format == "trl":
            card = cards.data_card(student, found, out)
        else:
            card = cards.model_card(student, args.format, found, out)
        (half / "README.md").write_text(card, encoding="utf-8")
        found["bytes"] = sum(path.stat().st_size for path in half.rglob("*") if path.is_file())
        stage = run.Stage(str(out), args, same, overwrite=True)
        _put(half, out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    print(f"{out}: {cards.title(student)}\nuse it:\n    {cards.command(student, args.format, out)}", file=sys.stderr)
    stage.finish({"format": args.format, "iteration": student.number, "out": str(out)} | found)


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise InputError(f"--out {out}: it is there already; --overwrite replaces it, or give another --out")
    try:
        ours = {"run", "format"} <= json.loads(Path(f"{out}.manifest.json").read_text())["same"].keys()
    except (OSError, ValueError, KeyError):
        ours = False
    if not ours and (not out.is_dir() or any(out.iterdir())):  # --overwrite . must not cost anybody a directory
        raise InputError(f"--out {out}: not written by this command ({out}.manifest.json does not say so), so it is "
                         "not replaced; give another --out")


def _put(half: Path, out: Path) -> None:
    """Rename the finished directory to its place; an older one goes when the new one is there."""
    old = out.with_name(f".{out.name}.replaced-export")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    half.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _main() -> None:
    home = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None

    def work(args: Args) -> None:
        if home is None:
            raise InputError("give a run first: python -m common.export RUN --format peft|merged|trl")
        sys.argv.insert(1, home)  # the manifest has the whole command
        export(Path(home), args)

    run.main(Args, work, "python -m common.export RUN --format peft|merged|trl [--iteration N] [--out DIR]")


if __name__ == "__main__":
    _main()
