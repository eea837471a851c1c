"""The numbers of common/report.py's page, all of them out of common/metrics.py: runs, arms, their comparison, its words."""

import re
import statistics

from common import failures, metrics
from common.errors import InputError

SPENT = ("tokens", "minutes", "dollars")


def describe_runs(runs: list[metrics.Run]) -> dict:
    """All that the page shows but the trajectories. `arm` of a run is a place in `arms`."""
    arms = list(dict.fromkeys(metrics.arm_names(runs)))
    arm_of = [arms.index(name) for name in metrics.arm_names(runs)]
    described = [describe_run(found, arm, name) for found, arm, name in zip(runs, arm_of, page_names(runs))]
    for one in described:
        have = [iteration["number"] for iteration in one["iterations"]]
        others = {iteration["number"] for other in described for iteration in other["iterations"]}
        one["missing"] += [f"Iteration {number} is missing." for number in sorted(others - {0, *have})]
    of_arms = [[found for found, mine in zip(runs, arm_of) if mine == arm] for arm in range(len(arms))]
    pairs, notes = comparisons(arms, of_arms)
    return {
        "title": title(arms, described),
        "lead": lead(arms, described),
        "arms": arms,
        "runs": described,
        "means": [means([one for one in described if one["arm"] == arm]) for arm in range(len(arms))],
        "pairs": pairs,
        "pair_notes": notes,
        "endings": metrics.endings(of_arms) if len(arms) > 1 else None,
        "modes": failure_modes(),
    }


def page_names(runs: list[metrics.Run]) -> list[str]:
    """The names of the directories; where two are alike, their paths."""
    names = [found.name for found in runs]
    return [name if names.count(name) == 1 else str(found.home) for found, name in zip(runs, names)]


def describe_run(found: metrics.Run, arm: int, name: str) -> dict:
    iterations, spent = [], dict.fromkeys(SPENT, 0)
    priced = any(part and part["cost"] and part["cost"]["dollars"] is not None for part in found.iterations.values())
    for number, part in found.iterations.items():
        cost = None if part is None else making(part, priced)
        for kind in spent:  # what is not known of one iteration is not known of those that build on it
            known = cost is not None and cost[kind] is not None and spent[kind] is not None
            spent[kind] = spent[kind] + cost[kind] if known else None
        iterations.append(
            {"number": number, "missing": part is None, **(part or {}), "cost": cost, "spent": dict(spent)}
        )
    scores = [part["eval"] for part in found.iterations.values() if part and part["eval"]]
    return {
        "name": name,
        "arm": arm,
        "seed": found.seed,
        "settings": {key: value for key, value in {**found.settings, "seed": found.seed}.items() if value is not None},
        "tasks": f"{scores[0]['on']} ({scores[0]['tasks']} task{'s' * (scores[0]['tasks'] != 1)})" if scores else None,
        "iterations": iterations,
        "chosen": found.best,
        "tests": [
            {"iteration": number, "chosen": number == found.best, "tasks": score["on"], "score": score}
            for number, score in found.test.items()
        ],
        "teacher": found.teacher,
        "missing": missing(found),
    }


def making(part: dict, priced: bool) -> dict:
    """What making an iteration's student took, its evaluation apart: tokens of both policies, minutes, dollars."""
    cost = part["cost"]
    if cost is None:
        return dict.fromkeys(SPENT)
    dollars = [part[stage]["cost"] for stage in ("collect", "labels") if part[stage] and "cost" in part[stage]]
    parts = [cost[who][kind] for who in ("teacher", "student") for kind in ("in", "out")]
    seconds = [cost["seconds"][stage] for stage in ("collect", "grades", "labels", "train")]
    nothing = not any(seconds)  # the untrained student
    tokens = sum(part or 0 for part in parts) if nothing or None not in parts[:2] or None not in parts[2:] else None
    return {
        "tokens": tokens,
        "minutes": sum(part or 0 for part in seconds) / 60,
        "dollars": 0.0 if priced and nothing else sum(dollars) if dollars else None,
    }


def missing(found: metrics.Run) -> list[str]:
    """What a run has not got yet, in sentences."""
    told = []
    for number, part in found.iterations.items():
        if part is None:
            told.append(f"Iteration {number} is missing.")
            continue
        names = {"collect": "collect", "labels": "relabel", "train": "train", "eval": "evaluate"}
        waiting = [name for key, name in names.items() if part[key] is None and (number > 0 or key == "eval")]
        if waiting:
            told.append(f"Iteration {number} is not finished; not there yet: {', '.join(waiting)}.")
    if found.best is not None and found.best not in found.test:
        told.append(f"The chosen student, of iteration {found.best}, is not scored on test tasks yet.")
    return told


def means(runs: list[dict]) -> dict:
    """The mean over an arm's seeds: of each iteration, and of the chosen students on the test tasks."""
    parts: dict[int, list[dict]] = {}
    for one in runs:
        for part in one["iterations"]:
            if part.get("eval") and part["eval"]["rate"] is not None:
                parts.setdefault(part["number"], []).append(part)
    tests = [
        test["score"]["rate"]
        for one in runs
        for test in one["tests"]
        if test["chosen"] and test["score"]["rate"] is not None
    ]
    iterations = [
        {
            "number": number,
            "rate": statistics.fmean(part["eval"]["rate"] for part in found),
            "seeds": len(found),
            "spent": {kind: mean_if_known([part["spent"][kind] for part in found]) for kind in SPENT},
        }
        for number, found in sorted(parts.items())
    ]
    return {"iterations": iterations, "test": {"rate": statistics.fmean(tests), "seeds": len(tests)} if tests else None}


def mean_if_known(values: list[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def comparisons(arms: list[str], runs: list[list[metrics.Run]]) -> tuple[list[dict], list[str]]:
    """Every other arm against one (metrics.reference): a row a seed, and the seeds together with both their intervals."""
    rows, told = [], []
    base = metrics.reference(runs)
    for other, theirs in zip(arms, runs):
        if other == arms[base]:
            continue
        against = f"{other} against {arms[base]}"
        try:
            found = metrics.compare(runs[base], theirs)
        except InputError as error:  # no task has a result on both sides
            told.append(f"{other} and {arms[base]} are not compared task by task: {error}.")
            continue
        if found is None:
            told.append(f"{other} and {arms[base]} have no seed in common in which both were evaluated.")
            continue
        for seed, one in found["seeds"].items():
            head = {"name": f"{against}, seed {seed}", "tasks": found["on"], "n": one["tasks"]}
            rows.append(head | {key: one[key] for key in ("only_a", "only_b", "difference", "low", "high", "p")})
        whole = found["together"]
        if whole["seeds"] > 1:
            both = {"tasks": found["on"], "n": whole["tasks"], "difference": whole["difference"], "p": None}
            rows.append(both | {"name": f"{against}, {whole['seeds']} seeds, bootstrap",
                                "low": whole["low"], "high": whole["high"]})  # fmt: skip
            rows.append(both | {"name": f"{against}, {whole['seeds']} seeds, t",
                                "low": whole["t_low"], "high": whole["t_high"]})  # fmt: skip
        for name, group in found["groups"].items():
            if not name.startswith("family "):
                wider = {"low": min, "high": max}
                rows.append({"name": f"{against}: {name}", "tasks": found["on"], "n": group["tasks"],
                             "difference": group["difference"], "p": None}
                            | {end: pick(group[key] for key in (end, f"t_{end}") if group[key] is not None)
                               for end, pick in wider.items()})  # fmt: skip
        told += [f"{other}: {note}." for note in metrics.notes(found)]
    if rows:
        told.append(
            "Each run at its chosen iteration, on the same tasks. A seed's row: Newcombe's interval for paired "
            "proportions, and McNemar's exact test; both are about other tasks of this kind, not about other seeds. "
            "Several seeds together: a bootstrap over seeds and tasks, and Student's t over the seeds' differences. Claim what "
            "both say; a group of tasks has the wider of the two."
        )
    return rows, told


def failure_modes() -> list[tuple[str, str]]:
    """Name and definition of each, in their order; the definitions are those of common/failures.py."""
    texts = {}
    for names, text in re.findall(r"^\* ([\w, ]+): (.+(?:\n  .+)*)", failures.__doc__, re.M):
        texts |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return [(name, texts[name]) for name in metrics.FAILURE_MODES]


def title(arms: list[str], runs: list[dict]) -> str:
    if len(runs) == 1:
        collected = any(part.get("collect") for part in runs[0]["iterations"])
        return f"{runs[0]['name']}: {arms[0] if collected else 'before any training'}"
    if len(arms) > 3:
        return f"{len(arms)} arms compared"
    return f"{' and '.join(arms)}, compared" if len(arms) > 1 else f"{arms[0]}, {len(runs)} runs"


def lead(arms: list[str], runs: list[dict]) -> str:

    def of_all(name: str):
        """The value of a setting that all runs share, else None."""
        values = {one["settings"].get(name) for one in runs}
        return values.pop() if len(values) == 1 else None

    tasks = next((one["tasks"] for one in runs if one["tasks"]), None)
    teacher = f"the teacher {of_all('teacher')}" if of_all("teacher") else "a teacher"
    who = f"{of_all('student') or 'A student'} learns to repair software from {teacher}"
    how = f"{', '.join(arms)}; {len(runs)} runs" if len(runs) > 1 else f"seed {runs[0]['seed']}"
    return f"{who} ({how}): what it resolves{f' of {tasks}' if tasks else ''} after each iteration, and why not more."
