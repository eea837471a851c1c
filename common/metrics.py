"""What came out of runs: summaries, and the table and the comparisons of several arms and seeds.

    python -m common.metrics runs/laptop                                       one run
    python -m common.metrics runs/sft0 runs/sft1 runs/dagger0 runs/dagger1     every other arm against the first one's

Writes iter_NNN/summary.json into each run. Runs are put together by their arm (all settings but the seed are equal)
and compared seed by seed, on the same tasks: on the test tasks if both arms have met them with the iteration that the
evaluation tasks chose (common.table), else on the evaluation tasks, which favours the arm with more iterations to
choose from. Runs that were evaluated differently are refused with the difference named.

The numbers, each with its definition: common/intervals.py (rates, paired differences, several seeds),
common/failures.py (failure modes), common/runs.py (summaries, covariate shift, arms).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.errors import InputError
from common.failures import FAILURE_MODES, failure_mode
from common.intervals import combine_seeds, paired, rate
from common.runs import (
    Run, arm_names, check_comparable, outcomes, read, shift, shift_rows, summarise, write_summaries,
)  # fmt: skip

__all__ = ["FAILURE_MODES", "Run", "arm_names", "check_comparable", "combine_seeds", "compare", "failure_mode",
           "outcomes", "paired", "rate", "read", "shift", "shift_rows", "summarise", "write_summaries"]  # fmt: skip


@dataclass(kw_only=True)
class Args:
    pass


def compare(a: list[Run], b: list[Run]) -> dict | None:
    """Two arms, each a list of runs of different seeds: b against a in the seeds that both have.

    Returns on (the tasks), test (whether these are the test tasks), seeds: {seed: paired(...)}, together:
    combine_seeds(...); None without a common seed in which both chose an iteration.
    """
    of = [{found.seed: found for found in arm if found.best is not None} for arm in (a, b)]
    pairs = {seed: (of[0][seed], of[1][seed]) for seed in of[0] if seed in of[1]}
    if not pairs:
        return None
    chosen = [found for pair in pairs.values() for found in pair]
    tested = all(found.best in found.test for found in chosen)

    def scored(found: Run) -> dict[str, bool]:
        number = f"iter_{found.best:03d}"
        return outcomes(found.home / "test" / number if tested else found.home / number / "eval")

    both = {seed: (scored(one), scored(other)) for seed, (one, other) in sorted(pairs.items())}
    scores = chosen[0].test[chosen[0].best] if tested else chosen[0].iterations[chosen[0].best]["eval"]
    return {
        "on": scores["on"],
        "test": tested,
        "seeds": {seed: paired(*pair) for seed, pair in both.items()},
        "together": combine_seeds(list(both.values())),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The printed table

def show(runs: list[Run]) -> None:
    """Print the table of arms and seeds, then every other arm against the first."""
    names = arm_names(runs)
    arms: dict[str, list[Run]] = {}
    for name, found in zip(names, runs):
        arms.setdefault(name, []).append(found)
    iterations = sorted({number for found in runs for number in found.iterations})
    heads = ["arm", "seed", "run", *(f"iteration {number}" for number in iterations), "chosen", "test"]
    lines = [
        [name, str(found.seed), found.name, *(_at(found, number) for number in iterations),
         "-" if found.best is None else str(found.best), _score(found.test.get(found.best))]
        for name, arm in arms.items() for found in arm
    ]  # fmt: skip
    _columns(heads, lines)
    scores = [part["eval"] for found in runs for part in found.iterations.values() if part and part["eval"]]
    tests = [score for found in runs for score in found.test.values()]
    on = f"{scores[0]['on']} ({scores[0]['tasks']} tasks)" if scores else "the evaluation tasks"
    print(f"\nresolved on {on} after each iteration, with 95 % Wilson intervals; chosen: the best of them")
    if tests:
        print(f"test: the chosen iteration on {tests[0]['on']} ({tests[0]['tasks']} tasks)")
    first, *others = arms
    for other in others:
        _show_comparison(first, other, compare(arms[first], arms[other]))
    if others:
        print(f"\ngained, lost: tasks that the arm alone resolved, and those that {first} alone did")


def _show_comparison(first: str, other: str, found: dict | None) -> None:
    if found is None:
        print(f"\n{other} against {first}: no seed in which both were evaluated")
        return
    how = "" if found["test"] else "; not both have met the test tasks, and to choose on these same tasks flatters"
    print(f"\n{other} against {first}, each at its chosen iteration, on {found['on']}{how}")
    lines = [
        [f"  seed {seed}", f"{one['rate_a']:.1%}", f"{one['rate_b']:.1%}", _points(one["difference"]),
         f"{_points(one['low'])} to {_points(one['high'])}", str(one["only_b"]), str(one["only_a"]), f"{one['p']:.2g}"]
        for seed, one in found["seeds"].items()
    ]  # fmt: skip
    _columns(["", first, other, "points", "95 %", "gained", "lost", "McNemar p"], lines)
    whole = found["together"]
    seeds = f"{whole['seeds']} seeds" if whole["seeds"] > 1 else "1 seed"
    print(f"  {seeds} together: {_points(whole['difference'])} points; 95 %: {_points(whole['low'])} to "
          f"{_points(whole['high'])} (bootstrap over seeds and tasks)", end="")  # fmt: skip
    if whole["t_low"] is None:
        print("; what another seed would give is not in it")
    else:
        print(f", {_points(whole['t_low'])} to {_points(whole['t_high'])} (t over seeds)")


def _at(found: Run, number: int) -> str:
    """The cell of one iteration: missing where there is no such directory between others."""
    if number not in found.iterations:
        return "-"
    summary = found.iterations[number]
    return "missing" if summary is None else _score(summary["eval"])


def _score(scores: dict | None) -> str:
    if not scores or scores["rate"] is None:
        return "-"
    return f"{scores['rate']:.0%} ({scores['rate_low']:.0%} to {scores['rate_high']:.0%})"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _columns(heads: list[str], lines: list[list[str]]) -> None:
    """Print columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *lines)]
    for line in (heads, ["-" * width for width in widths], *lines):
        numbers = [cell.rjust(width) for cell, width in zip(line, widths)][1:]
        print("  ".join([line[0].ljust(widths[0]), *numbers]).rstrip())


def homes_from(argv: list[str]) -> list[Path]:
    """The run directories that stand before the flags, taken out of `argv`."""
    homes = []
    while len(argv) > 1 and not argv[1].startswith("-"):
        homes.append(Path(argv.pop(1)))
    return homes


def check_homes(homes: list[Path], command: str) -> None:
    """Raises InputError where no run was given to `command`, or one twice."""
    if not homes:
        raise InputError(f"which runs? {command} RUN_DIRECTORY [RUN_DIRECTORY...]")
    for home in homes:
        if [other.resolve() for other in homes].count(home.resolve()) > 1:
            raise InputError(f"{home} is given twice")


def _main() -> None:
    homes = homes_from(sys.argv)

    def work(args: Args) -> None:
        check_homes(homes, "python -m common.metrics")
        runs = [write_summaries(home) for home in homes]
        if len(runs) > 1:
            check_comparable(runs)
        show(runs)

    run.main(Args, work)


if __name__ == "__main__":
    _main()
