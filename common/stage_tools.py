"""Plumbing that 01, 02 and 04 share: checked counts, the progress bar, the infra file, counting tokens."""

import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Iterable

from tqdm import tqdm

from common import jsonl, run
from common.errors import InfraError, InputError, StageError
from common.work import Work

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


AT_LEAST_1 = ("workers", "slots", "max_turns", "max_context", "max_tokens", "max_new_tokens", "sample", "limit", "attempts",
              "max_labels", "student_inflight", "teacher_inflight")  # fmt: skip
MORE_THAN_0 = ("time_limit", "command_timeout", "test_timeout", "max_cost")
AT_LEAST_0 = ("infra_retries", "max_infra")


def check_numbers(args) -> None:
    """Raise InputError for a flag of 01, 02 or 04 with a number that cannot be meant."""
    for names, good, wanted in ((AT_LEAST_1, lambda number: number >= 1, "at least 1"),
                                (MORE_THAN_0, lambda number: 0 < number < math.inf, "more than 0, and not infinite"),
                                (AT_LEAST_0, lambda number: 0 <= number < math.inf, "at least 0")):  # fmt: skip
        for name in names:
            number = getattr(args, name, None)
            if number is not None and not good(number):
                raise InputError(f"--{name.replace('_', '-')} must be {wanted}, not {number}")


def run_jobs(
    args,
    stage,
    output,
    jobs: list,
    todo: list,
    do: Callable[[tuple], Iterable[dict]],
    workers: int,
    title: str,
    postfix: Callable[[dict], dict],
    meter=None,
) -> int:
    """Do every piece of work in `todo`, write the records that `do` yields; returns how many the machine left undone.

    The bar counts pieces of work; beside it stand the numbers of `postfix(record)`, added up (see `beside_bar`), and what
    `meter` (cost.Meter) has counted.
    """
    sums: dict[str, float] = {}
    infra_path, began = Path(f"{output.path}.infra.jsonl"), time.monotonic()
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=title, disable=getattr(args, "show", False),
              dynamic_ncols=True, file=sys.stderr, bar_format=BAR) as bar:  # fmt: skip

        def add(numbers: dict) -> None:
            for name, number in numbers.items():
                sums[name] = sums.get(name, 0) + number
            if meter and meter.price:
                sums["cost"] = meter.spent
            bar.set_postfix_str(beside_bar(sums, time.monotonic() - began), refresh=False)

        def write(record: dict) -> None:
            output.append(record)
            stage.note_time()
            add(postfix(record))

        def failed(job, error: InfraError) -> None:
            stage.log.info("infra error: %s: %s", job, error)
            record = getattr(error, "record", None) or {"job": job}
            with open(infra_path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(record | {"error": str(error)}, ensure_ascii=False) + "\n")
            add({"infra errors": 1})

        work = Work(workers, args.infra_retries, args.max_infra, len(jobs))
        try:
            left = work.run(todo, do, write, lambda job: bar.update(), failed)
        except StageError as error:
            raise StageError(f"{error} ({infra_path} has all of them)" if infra_path.exists() else str(error)) from None
    if left:
        stage.log.warning("%d of %d could not be run; they are in %s", left, len(jobs), infra_path)
    return left


def beside_bar(sums: dict[str, float], seconds: float) -> str:
    """What stands beside the bar: rates of turns and tokens since the start, the teacher's share of turns, the cost in
    dollars, and every other number as it is."""
    parts = []
    for name, number in sums.items():
        if name in ("turns", "tokens"):
            rate = number / max(seconds, 1e-3)
            parts.append(f"{rate:.{0 if rate >= 10 else 1}f} {name}/s")
        elif name == "teacher turns":
            parts.append(f"teacher {100 * number / max(sums['turns'], 1):.0f}%")
        elif name == "cost":
            parts.append(f"${number:.2f}")
        else:
            parts.append(f"{name} {number:g}")
    return ", ".join(parts)


def token_counter(stage, *policies) -> Callable[[str], int]:
    """Count the tokens of a text as the first policy that has a tokenizer does; the manifest says which.

    Where none has one (oracle and replay), four bytes are taken for a token: good for shares, not for bills. What a server
    itself counted is never counted again.
    """
    for policy in policies:
        if policy.count("a") is not None:
            stage.manifest["tokens_counted_by"] = f"the tokenizer of {policy.name}"
            return policy.count
    stage.manifest["tokens_counted_by"] = "bytes / 4"
    return lambda text: math.ceil(len(text.encode(errors="replace")) / 4)


class RecordedStudent:
    """The tokenizer of the student in a record: 02_relabel.py counts with it as 01_collect.py did."""

    def __init__(self, student: dict | None):
        self.name = (student or {}).get("model") or ""
        self.tokenizer, self.lock = None, threading.Lock()  # tokenizers are not safe to share between threads

    def count(self, text: str) -> int | None:
        """None where its tokenizer is not to be had."""
        kind, _, model = self.name.partition(":")
        if kind != "hf":
            return None
        from common import models

        with self.lock:
            try:
                self.tokenizer = self.tokenizer or models.load_tokenizer(model)[0]
            except InputError:
                return None
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def grades_of(trajectories: str | Path) -> Path:
    """The results.jsonl of the grades beside a file of trajectories; InputError that says how to make it where it is missing."""
    path = Path(trajectories).parent / "grades/results.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing: {_how_to_grade(trajectories)}")
    return path


def _how_to_grade(trajectories: str | Path) -> str:
    home = Path(trajectories).parent
    return f"04_eval.py --tasks TASKS --trajectories {trajectories} --out {home}/grades makes it"


def resolved(trajectories: str | Path, trajectory_ids: Iterable[str]) -> set[str]:
    """Those of the ids that resolved their task, as the file of their trajectories was graded into `grades` beside it.

    Raises InputError where the file is not graded, or what was graded is not what it holds now.
    """
    path, ids, how = grades_of(trajectories), set(trajectory_ids), _how_to_grade(trajectories)
    manifest = path.with_name("manifest.json")
    graded = run.read_object(manifest).get("same", {}).get("trajectories") if manifest.is_file() else None
    if graded and graded != run.hash_file(trajectories):
        raise InputError(f"{path} is of other trajectories than {trajectories} holds now: {how}, with --overwrite")
    found, graded = set(), set()
    for result in jsonl.read(path, "result"):
        graded.add(result["trajectory_id"])
        found |= {result["trajectory_id"]} if result["resolved"] else set()
    if not ids & graded:
        raise InputError(f"{path} has no result for any trajectory of {trajectories}: {how}")
    return found & ids


def show_result(show, row: dict, record: dict) -> None:
    """The end of a transcript: how it ended, and for a task with `local` and tests, whether the patch is right."""
    from common import grading

    if not record["patch"].strip():
        return show.result(f"{record['exit_status']}, nothing changed", False)
    added = [line for line in record["patch"].splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    gradable = row.get("local") and (row["FAIL_TO_PASS"] or row["PASS_TO_PASS"])
    verdict, why = None, ""
    try:
        verdict = grading.grade(row, record["patch"])["resolved"] if gradable else None
    except (InfraError, InputError) as error:  # the trajectory is good all the same
        why = f" ({error})"
    show.result(
        "\n".join(added[:12] + ["…"] * (len(added) > 12))
        + f"\n{record['exit_status']}, {({True: 'RESOLVED', False: 'not resolved', None: 'not graded here'})[verdict]}{why}",
        verdict,
    )
