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

from common import run, table
from common.errors import InputError
from common.failures import FAILURE_MODES, failure_mode
from common.intervals import combine_seeds, paired, rate
from common.runs import (
    Run, arm_names, check_comparable, outcomes, read, shift, shift_rows, summarise, task_groups, write_summaries,
)  # fmt: skip

__all__ = ["FAILURE_MODES", "Run", "arm_names", "check_comparable", "combine_seeds", "compare", "endings",
           "failure_mode", "outcomes", "paired", "rate", "read", "reference", "shift", "shift_rows", "summarise", "write_summaries"]  # fmt: skip


@dataclass(kw_only=True)
class Args:
    pass


def compare(a: list[Run], b: list[Run]) -> dict | None:
    """Two arms, each a list of runs of different seeds: b against a in the seeds that both have.

    On the test tasks in those seeds in which both have met them, and where there is none on the evaluation tasks. A task
    without a result in one of the runs (the machine failed) is left out of all of them.
    Returns on (the tasks), test (whether these are the test tasks), left_out (how many tasks), seeds: {seed: paired(...)},
    seeds_left_out (not tested yet), uneven (seeds in which one run has evaluated other iterations than the other),
    together: combine_seeds(...), groups: {group of tasks: the same of its tasks alone}, without groups that hold all
    tasks or a single one; None without a common seed in which both chose an iteration. Raises InputError where no task
    has a result in all of the runs.
    """
    of = [{found.seed: found for found in arm if found.best is not None} for arm in (a, b)]
    pairs = {seed: (of[0][seed], of[1][seed]) for seed in sorted(of[0].keys() & of[1].keys(), key=str)}
    if not pairs:
        return None
    tested = {seed: pair for seed, pair in pairs.items() if all(found.best in found.test for found in pair)}
    waiting = [seed for seed in pairs if seed not in tested] if tested else []

    def place(found: Run) -> Path:
        number = f"iter_{found.best:03d}"
        return found.home / "test" / number if tested else found.home / number / "eval"

    used = tested or pairs
    both = {seed: (outcomes(place(one)), outcomes(place(other))) for seed, (one, other) in used.items()}
    results = [set(found) for pair in both.values() for found in pair]
    every, common = set.union(*results), set.intersection(*results)
    both = {seed: tuple({task: found[task] for task in common} for found in pair) for seed, pair in both.items()}
    one = next(iter(used.values()))[0]
    groups = {name: tasks & common for name, tasks in sorted(task_groups(place(one)).items())}
    return {
        "on": (one.test[one.best] if tested else one.iterations[one.best]["eval"])["on"],
        "test": bool(tested),
        "left_out": len(every) - len(common),
        "seeds": {seed: paired(*pair) for seed, pair in both.items()},
        "seeds_left_out": waiting,
        "uneven": [seed for seed, pair in used.items() if len({tuple(_evaluated(found)) for found in pair}) > 1],
        "together": combine_seeds(list(both.values())),
        "groups": {
            name: combine_seeds([tuple({task: found[task] for task in tasks} for found in pair) for pair in both.values()])
            for name, tasks in groups.items()
            if 1 < len(tasks) < len(common)
        },
    }


def _evaluated(found: Run) -> list[int]:
    return [number for number, part in found.iterations.items() if number > 0 and part and part["eval"]]


def reference(arms: list[list[Run]]) -> int:
    """The place of the arm that all others are set against: the first one with a run that is evaluated."""
    return next((place for place, arm in enumerate(arms) if any(found.best is not None for found in arm)), 0)


def endings(arms: list[list[Run]]) -> dict | None:
    """How the tasks of each arm's chosen students ended: on, test, and arms: per arm None or {runs, tasks, resolved,
    failure_modes}, the mean number of tasks in a run. On the test tasks where every run has met them, else on the
    evaluation tasks. None where nothing is evaluated."""
    chosen = [[found for found in arm if found.best is not None] for arm in arms]
    if not any(chosen):
        return None
    test = all(found.best in found.test for arm in chosen for found in arm)
    told, on = [], None
    for arm in chosen:
        scores = [found.test[found.best] if test else found.iterations[found.best]["eval"] for found in arm]
        modes = [score.get("failure_modes") or {} for score in scores]
        on = on or (scores[0]["on"] if scores else None)
        told.append({
            "runs": len(scores),
            **{name: sum(score[name] for score in scores) / len(scores) for name in ("tasks", "resolved")},
            "failure_modes": {mode: sum(of.get(mode, 0) for of in modes) / len(modes)
                              for mode in FAILURE_MODES if any(mode in of for of in modes)},
        } if scores else None)  # fmt: skip
    return {"on": on, "test": test, "arms": told}


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
    for name, arm in arms.items():
        if len(commits := dict.fromkeys(str(found.settings["code"]) for found in arm)) > 1:
            print(f"{name}: its runs were made by code of {len(commits)} commits, {', '.join(commits)}")
    first = list(arms)[reference(list(arms.values()))]
    others = [name for name in arms if name != first]
    for other in others:
        try:
            found = compare(arms[first], arms[other])
        except InputError as error:  # of this pair alone
            print(f"\n{other} against {first}: {error}")
            continue
        _show_comparison(first, other, found)
    if others:
        print(f"\ngained, lost: tasks that the arm alone resolved, and those that {first} alone did")
    if others and (ends := endings(list(arms.values()))):
        _show_endings(list(arms), ends)


def _show_comparison(first: str, other: str, found: dict | None) -> None:
    if found is None:
        print(f"\n{other} against {first}: no seed in which both were evaluated")
        return
    print(f"\n{other} against {first}, each at its chosen iteration, on {found['on']}")
    for note in notes(found):
        print(f"  {note}")
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
    for name, of in found["groups"].items():
        if not name.startswith("family "):
            t = "" if of["t_low"] is None else f", {_points(of['t_low'])} to {_points(of['t_high'])} (t)"
            print(f"    {name} ({of['tasks']} tasks): {_points(of['difference'])}; {_points(of['low'])} to "
                  f"{_points(of['high'])}{t}")  # fmt: skip


def _show_endings(names: list[str], found: dict) -> None:
    """The table of failure modes, an arm in each column."""
    arms = [arm or {"resolved": None, "failure_modes": {}} for arm in found["arms"]]
    modes = [mode for mode in FAILURE_MODES if any(mode in arm["failure_modes"] for arm in arms)]
    print(f"\nhow the tasks ended, in the mean of an arm's runs, each at its chosen iteration, on {found['on']}")
    cells = [["resolved", *(arm["resolved"] for arm in arms)]]
    cells += [[mode.replace("_", " "), *(arm["failure_modes"].get(mode, 0) for arm in arms)] for mode in modes]
    _columns(["", *names], [[head, *("-" if n is None else f"{n:.1f}".removesuffix(".0") for n in row)] for head, *row in cells])


def notes(found: dict) -> list[str]:
    """What to know of a comparison: which tasks and seeds are not in it, and on what it was made."""
    told = []
    if number := found["left_out"]:
        told.append(f"{number} task{'s' * (number > 1)} left out, for lack of a result in one of the runs at least "
                    "(the machine failed)")  # fmt: skip
    if found["seeds_left_out"]:
        seeds = ", ".join(map(str, found["seeds_left_out"]))
        told.append(f"not in it, for not both have met the test tasks there: seed {seeds}")
    if found["uneven"]:
        seeds = ", ".join(map(str, found["uneven"]))
        told.append(f"one run has more iterations than the other, and so more to choose from: seed {seeds}")
    if not found["test"]:
        told.append("not both have met the test tasks, and to choose on the tasks that one is scored on flatters")
    return told


def _at(found: Run, number: int) -> str:
    """The cell of one iteration: missing where another run has it; the untrained student need not be scored."""
    summary = found.iterations.get(number)
    if summary is None and number == 0:
        return "-"
    return "missing" if summary is None else _score(summary["eval"])


def _score(scores: dict | None) -> str:
    if not scores or scores["rate"] is None:
        return "-"
    left = f", {scores['infra_errors']} not run{table.of_all(scores)}" if scores.get("infra_errors") else ""
    return f"{scores['rate']:.0%} ({scores['rate_low']:.0%} to {scores['rate_high']:.0%}{left})"


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
        check_comparable(runs)
        show(runs)

    run.main(Args, work, "python -m common.metrics RUN [RUN...]")


if __name__ == "__main__":
    _main()
