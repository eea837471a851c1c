"""The table at the end of run_loop.sh, read from the manifests of a run.

    python -m common.table runs/laptop
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.errors import InputError

COLUMNS = ("iteration", "beta", "teacher turns", "teacher tokens", "labels", "agree", "loss", "resolved", "95 %",
           "tokens in", "cached", "out", "cost", "minutes")  # fmt: skip

# stage -> its manifest in an iteration's directory
STAGES = {
    "collect": "trajectories.jsonl.manifest.json",
    "relabel": "labels.jsonl.manifest.json",
    "train": "adapter/manifest.json",
    "eval": "eval/manifest.json",
}

# in the summaries of 01 (two policies and --inline), 02 and 04
NAMES = {kind: {f"{who}_{kind}" for who in ("student_tokens", "teacher_tokens", "inline", "tokens")} for kind in ("in", "cached")}
NAMES |= {"out": {"inline_out", "tokens_out"}, "cost": {"cost"}}


@dataclass(kw_only=True)
class Args:
    iterations: int | None = None
    """look at the first N iterations (default: all)"""
    best: bool = False
    """print the number of the iteration that resolved most on the evaluation tasks, nothing else"""


def manifest(path: Path) -> dict | None:
    """The manifest of a finished stage, else None."""
    content = run.read_object(path) if path.exists() else {}
    return content if content.get("finished") else None


def read_run(home: Path, iterations: int | None) -> dict[int, dict[str, dict]]:
    """iteration -> stage -> manifest, for the stages that are finished."""
    table = {}
    for path in sorted(home.glob("iter_[0-9][0-9][0-9]")):
        number = int(path.name.removeprefix("iter_"))
        if iterations is None or number <= iterations:
            found = {name: manifest(path / file) for name, file in STAGES.items()}
            table[number] = {name: content for name, content in found.items() if content}
    if not any(table.values()):
        raise InputError(f"{home}: no finished stage in there; run_loop.sh makes one with RUN={home.name}")
    return table


def best_iteration(table: dict[int, dict[str, dict]]) -> int:
    """The iteration with the highest rate on the evaluation tasks; the earliest of equals."""
    scored = {i: stages["eval"]["summary"]["rate"] or 0.0 for i, stages in table.items() if "eval" in stages and i > 0}
    if not scored:
        raise InputError("no iteration of this run is evaluated yet")
    return max(scored, key=lambda i: (scored[i], -i))


def tests(home: Path) -> dict[int, dict]:
    """iteration -> manifest of its finished evaluation on the test tasks. Raises InputError where it scored other weights
    than lie there now."""
    found = {}
    for path in sorted(home.glob("test/iter_[0-9][0-9][0-9]")):
        if tested := manifest(path / "manifest.json"):
            evaluated = manifest(home / path.name / "eval/manifest.json")
            hashes = [((made or {}).get("same", {}).get("student") or {}).get("adapter_hash") for made in (tested, evaluated)]
            if None not in hashes and hashes[0] != hashes[1]:
                raise InputError(f"{path}: this score is of other weights than {home / path.name}/eval: the student was "
                                 "trained again since; run this evaluation again with --overwrite, or move it away")
            found[int(path.name.removeprefix("iter_"))] = tested
    return found


def of_all(summary: dict) -> str:
    """What to add where tasks were not run: the official rate counts all of them (04_eval.py, rate_of_all)."""
    return f"; of all {summary['rate_of_all']:.0%}" if summary.get("rate_of_all") is not None else ""


def _score(summary: dict) -> tuple[str, str]:
    if summary["rate"] is None:
        return "none", ""
    left = summary.get("infra_errors", 0)  # tasks that the machine failed are in no rate
    share = f"{summary['resolved']}/{summary['tasks'] - left} = {summary['rate']:.0%}"
    if left:
        share += f" ({left} not run{of_all(summary)})"
    return share, f"{summary['rate_low']:.0%} to {summary['rate_high']:.0%}"


def _spent(summaries: list[dict]) -> dict[str, str]:
    """Tokens of both policies in collect, relabel and evaluate: prompts, the cached share of them, answers; dollars."""

    def total(kind: str) -> float:
        return sum(number for summary in summaries for name, number in summary.items() if name in NAMES[kind])

    if not any(total(kind) for kind in NAMES):
        return {}
    tokens = {"tokens in": _short(total("in")), "out": _short(total("out"))}
    if total("in"):
        tokens["cached"] = f"{total('cached') / total('in'):.0%}"
    priced = any("cost" in summary for summary in summaries)
    return tokens | ({"cost": f"${total('cost'):.2f}"} if priced else {})


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def row(iteration: int, stages: dict[str, dict]) -> list[str]:
    """The cells of one iteration; a stage that is not there is shown as a dash."""
    cells = dict.fromkeys(COLUMNS, "-") | {"iteration": str(iteration)}
    if "collect" in stages:
        summary = stages["collect"]["summary"]
        if summary["beta"] is not None:  # a prefix has none
            cells["beta"] = f"{summary['beta']:.2f}"
        cells["teacher turns"] = f"{summary['teacher_turn_share']:.2f}"
        cells["teacher tokens"] = f"{summary['teacher_token_share']:.2f}"
    if "relabel" in stages and stages["relabel"]["summary"]["agree"] is not None:
        cells["agree"] = f"{stages['relabel']['summary']['agree']:.2f}"
    if "train" in stages:
        cells["labels"] = str(stages["train"]["summary"]["labels"])
        cells["loss"] = f"{stages['train']['summary']['loss']:.3f}"
    if "eval" in stages:
        cells["resolved"], cells["95 %"] = _score(stages["eval"]["summary"])
    cells |= _spent([content["summary"] for name, content in stages.items() if name != "train"])
    cells["minutes"] = " + ".join(f"{content['seconds'] / 60:.1f}" for content in stages.values())
    return [cells[name] for name in COLUMNS]


def show(home: Path, iterations: int | None) -> None:
    table = read_run(home, iterations)
    rows = [list(COLUMNS)] + [row(number, stages) for number, stages in table.items()]
    if all(line[COLUMNS.index("cost")] == "-" for line in rows[1:]):
        rows = [[cell for name, cell in zip(COLUMNS, line) if name != "cost"] for line in rows]
    widths = [max(len(line[place]) for line in rows) for place in range(len(rows[0]))]
    for place, line in enumerate(rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
        if place == 0:
            print("  ".join("-" * width for width in widths))
    print("\nminutes: collect + relabel + train + evaluate;  agree: share of student turns with the teacher's command")
    print("tokens in, cached, out: of both policies, asked in collect, relabel and evaluate")
    if teacher := manifest(home / "teacher/eval/manifest.json"):
        print("the teacher itself: %s (%s)" % _score(teacher["summary"]))
    scored = any("eval" in stages for number, stages in table.items() if number > 0)
    best = best_iteration(table) if scored else None
    if scored:
        print(f"best on {table[best]['eval']['settings']['tasks']}: iteration {best}")
    else:
        print("no iteration is evaluated yet")
    for number, tested in tests(home).items():
        chosen = "chosen" if number == best else "chosen by a shorter run"
        score = "%s (%s)" % _score(tested["summary"])
        print(f"on {tested['settings']['tasks']}, iteration {number} ({chosen}): {score}")
        for name, group in run.read_object(home / f"test/iter_{number:03d}/summary.json")["groups"].items():
            if not name.startswith("family "):
                print(f"    {name}: %s (%s)" % _score(group))
    every = [run.read_object(path) for path in home.rglob("*manifest.json")]
    minutes = sum(content.get("seconds", 0) for content in every) / 60
    memory = max(content.get("peak_memory_mb", 0) for content in every) / 1024
    print(f"{minutes:.0f} minutes in all, at most {memory:.1f} GB of memory in one process")
    if scored:
        print("\nuse this student:")
        student = table[best]["eval"]["settings"]["student"]
        print(f"    .venv/bin/python 04_eval.py --tasks toy:dev:4 --student {student} --out try")


def _main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m common.table RUN_DIRECTORY [--iterations N] [--best]")
    home = Path(sys.argv.pop(1))

    def work(args: Args) -> None:
        if args.best:
            print(best_iteration(read_run(home, args.iterations)))
        else:
            show(home, args.iterations)

    run.main(Args, work)


if __name__ == "__main__":
    _main()
