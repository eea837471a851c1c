"""Plumbing that 01, 02 and 04 share: checked counts, the progress bar, the infra file, counting tokens."""

import json
import math
import sys
from pathlib import Path
from typing import Callable, Iterable

from tqdm import tqdm

from common.errors import InfraError, InputError
from common.work import Work


def check_counts(args, *names: str) -> None:
    """Raise InputError unless every named flag is at least 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")


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
) -> int:
    """Do every piece of work in `todo`, write the records that `do` yields; returns how many the machine left undone.

    The bar counts pieces of work; beside it stand the numbers of `postfix(record)`, added up.
    """
    sums: dict[str, float] = {}
    infra_path = Path(f"{output.path}.infra.jsonl")
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=title, disable=getattr(args, "show", False),
              dynamic_ncols=True, smoothing=0.1, file=sys.stderr) as bar:  # fmt: skip

        def write(record: dict) -> None:
            output.append(record)
            for name, number in postfix(record).items():
                sums[name] = sums.get(name, 0) + number
            bar.set_postfix({name: f"{number:g}" for name, number in sums.items()}, refresh=False)

        def failed(job, error: InfraError) -> None:
            stage.log.info("infra error: %s: %s", job, error)
            record = getattr(error, "record", None) or {"job": job}
            with open(infra_path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(record | {"error": str(error)}, ensure_ascii=False) + "\n")
            sums["infra errors"] = sums.get("infra errors", 0) + 1
            bar.set_postfix({name: f"{number:g}" for name, number in sums.items()})

        work = Work(workers, args.infra_retries, args.max_infra, len(jobs))
        left = work.run(todo, do, write, lambda job: bar.update(), failed)
    if left:
        stage.log.warning("%d of %d could not be run; they are in %s", left, len(jobs), infra_path)
    return left


def token_counter(*policies) -> Callable[[str], int]:
    """Count the tokens of a text as the first policy that has a tokenizer does.

    Where none has one (oracle and replay), four bytes are taken for a token: good for shares, not for bills.
    """
    for policy in policies:
        if policy.count("a") is not None:
            return policy.count
    return lambda text: math.ceil(len(text.encode()) / 4)


def show_result(show, row: dict, record: dict) -> None:
    """The end of a transcript: how it ended, and for a task with `local`, whether the patch is right."""
    from common import grading

    if not record["patch"].strip():
        return show.result(f"{record['exit_status']}, nothing changed", False)
    added = [line for line in record["patch"].splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    verdict = grading.grade(row, record["patch"])["resolved"] if row.get("local") else None
    show.result(
        "\n".join(added[:12] + ["…"] * (len(added) > 12))
        + f"\n{record['exit_status']}, {({True: 'RESOLVED', False: 'not resolved', None: 'not graded here'})[verdict]}",
        verdict,
    )
