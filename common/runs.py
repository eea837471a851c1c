"""What a run directory holds, as numbers: a summary of each iteration, the settings that make its arm.

Everything comes from finished stages: their manifests, results.jsonl, labels.jsonl, adapter/label_nll.jsonl. Runs of
older code can be read; what they did not record is None. The recorded failure modes are taken as they are: after a
change of their definitions, `04_eval.py --regrade` works them out again from the logs.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from common import jsonl, run, table
from common.errors import InputError

TOKENS = ("in", "cached", "out")

# setting -> the stage whose manifest has it, and its name there
SETTINGS = {
    **{name: ("collect", name) for name in (
        "mix", "schedule", "beta", "prefix_turns", "teacher", "tasks", "sample", "attempts", "limit", "prompts",
        "student_extra", "teacher_extra", "temperature", "top_p", "max_turns", "max_context", "max_tokens",
        "max_new_tokens", "time_limit", "command_timeout")},
    "acting": ("collect", "student"),
    **{name: ("relabel", name) for name in ("max_labels", "label_states")},
    **{f"label_{name}": ("relabel", name) for name in ("teacher", "temperature", "top_p", "teacher_extra")},
    **{name: ("train", name) for name in (
        "keep", "epochs", "steps_per_epoch", "max_steps", "lr", "warmup", "batch_size", "loss_norm", "packing", "quant",
        "lora_rank", "lora_alpha", "clip")},
    "student": ("eval", "student"),
}  # fmt: skip
DEFAULTS = {"keep": "all", "label_states": "all"}  # what code without these knobs did
WHOLE = ("mix", "schedule", "beta", "prefix_turns", "acting", "teacher", "label_teacher", "keep", "student")  # see _settings
OF_MIX = {"schedule": "turn", "beta": "turn", "prefix_turns": "prefix"}  # these say something with one --mix alone


@dataclass(kw_only=True)
class Run:
    """One run directory, read. An iteration that is missing between others is None."""

    home: Path
    name: str
    seed: int | None
    settings: dict
    of_iterations: dict[str, dict[int, object]]
    """setting -> iteration -> its value, for the iterations in which its stage is finished"""
    iterations: dict[int, dict | None]
    """number -> what summarise() gives; without a number 0 the untrained student was not scored"""
    best: int | None = None
    """the iteration that resolved most on the evaluation tasks (common.table.best_iteration)"""
    test: dict[int, dict] = field(default_factory=dict)
    """number -> the scores of that iteration's student on the test tasks, like "eval" of summarise()"""
    teacher: dict | None = None
    """the teacher's own scores on the evaluation tasks"""


def read(home: str | Path) -> Run:
    """The run in a directory. Raises InputError for a directory that is no run, or an empty one."""
    home = Path(home)
    if not home.is_dir():
        raise InputError(f"{home}: no such directory; RUN={home.name} ./run_loop.sh makes a run")
    stages = table.read_run(home, None)
    scored = any("eval" in found for number, found in stages.items() if number > 0)
    settings, seed, of_iterations = _settings(stages)
    return Run(
        home=home, name=home.resolve().name, seed=seed, settings=settings, of_iterations=of_iterations,
        iterations={number: summarise(_iteration(home, number)) if number in stages else None
                    for number in range(min(1, *stages), max(stages) + 1)},
        best=table.best_iteration(stages) if scored else None,
        test={number: _scores(found) for number, found in table.tests(home).items()},
        teacher=_scores(table.manifest(home / "teacher/eval/manifest.json")),
    )  # fmt: skip


def write_summaries(home: str | Path) -> Run:
    """Read a run and write iter_NNN/summary.json of each of its iterations."""
    found = read(home)
    for number, summary in found.iterations.items():
        if summary is not None:
            path = _iteration(found.home, number) / "summary.json"
            jsonl.write_atomically(path, json.dumps(run.finite(summary), indent=1) + "\n")
    return found


def summarise(directory: str | Path) -> dict:
    """One iteration, ready for JSON. Each part is None where its stage is not finished.

    collect: the summary of 01 (trajectories, turns, teacher_turn_share, teacher_token_share, ...), mix, seconds.
    grades: the summary of 04 on what was collected (KEEP=resolved), seconds.
    labels: the summary of 02 (states, executed, queried, cached, invalid, agree, ...), labels (the valid ones), tasks
        (that have one), per_task, seconds.
    train: the summary of 03 (labels, label_tokens, loss, steps, ...): of all the iterations that it trained on.
    eval: the summary of 04 (tasks, resolved, rate with its interval, failure_modes, groups, ...), on, seconds.
    shift: common.metrics.shift of shift_rows; None without labels.
    cost: tokens (in, cached, out) of the teacher (acting and labelling), of the student (acting) and of evaluating it;
        dollars, None without a price; seconds of each stage. Numbers that were not recorded are None.
    """
    directory = Path(directory)
    found = {name: table.manifest(directory / file) for name, file in table.STAGES.items()}
    collect, labels, train, grades = (
        content and {"seconds": content["seconds"]} | content["summary"]
        for content in (found["collect"], found["relabel"], found["train"], table.manifest(directory / "grades/manifest.json"))
    )
    scores = _scores(found["eval"])
    rows = None
    if collect:
        collect |= {"mix": found["collect"]["settings"]["mix"]}
    if labels:
        tasks, count = set(), 0
        for label in jsonl.read(directory / "labels.jsonl", "label"):  # one at a time: there may be 100,000
            if label["valid"]:
                tasks.add(label["instance_id"])
                count += 1
        labels |= {
            "labels": count,
            "tasks": len(tasks),
            "per_task": count / len(tasks) if tasks else None,
        }
        rows = shift_rows(directory)
    return {
        "collect": collect,
        "grades": grades,
        "labels": labels,
        "train": train,
        "eval": scores,
        "shift": None if rows is None else shift(rows),
        "cost": _cost({"collect": collect, "grades": grades, "labels": labels, "train": train, "eval": scores}),
    }


def outcomes(directory: str | Path) -> dict[str, bool]:
    """instance_id -> resolved, of a finished evaluation. Raises InputError where a task has several results."""
    found: dict[str, bool] = {}
    path = Path(directory) / "results.jsonl"
    for result in jsonl.read(path, "result"):
        if result["instance_id"] in found:
            raise InputError(f"{path}: {result['instance_id']!r} has several results: of attempts, not of tasks")
        found[result["instance_id"]] = result["resolved"]
    return found


def task_groups(directory: str | Path) -> dict[str, set[str]]:
    """group (families of bugs, repositories) -> its instance_ids, of a finished evaluation; older ones have none."""
    found: dict[str, set[str]] = {}
    for result in jsonl.read(Path(directory) / "results.jsonl", "result"):
        for name in result.get("groups", ()):
            found.setdefault(name, set()).add(result["instance_id"])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Covariate shift

def shift_rows(directory: str | Path) -> list[dict] | None:
    """One row for each label of an iteration: turn, student_turns (of the student, in the history before this turn),
    agrees (labels.jsonl), tokens, before and after (adapter/label_nll.jsonl; None where a label was not measured).

    None where there are no labels or trajectories.
    """
    directory = Path(directory)
    measured = {}
    if (path := directory / "adapter/label_nll.jsonl").exists() and table.manifest(directory / "adapter/manifest.json"):
        measured = {(row["trajectory_id"], row["turn"]): row for row in jsonl.read(path)}
    if not all((directory / name).exists() for name in ("labels.jsonl", "trajectories.jsonl")):
        return None
    before: dict[tuple[str, int], int] = {}  # (trajectory, turn) -> turns of the student before it
    for record in jsonl.read(directory / "trajectories.jsonl"):
        count = 0
        for message in record["messages"]:
            if message["role"] == "assistant":
                before[record["trajectory_id"], message["turn"]] = count
                count += message["actor"] == "student"
    rows = []
    for label in jsonl.read(directory / "labels.jsonl", "label"):
        key = label["trajectory_id"], label["turn"]
        if key not in before:
            raise InputError(f"{directory / 'labels.jsonl'}: {key[0]!r} has no turn {key[1]} in trajectories.jsonl: "
                             "label these trajectories again (02_relabel.py)")
        row = measured.get(key, {})
        rows.append({"turn": key[1], "student_turns": before[key], "agrees": label["agrees"]}
                    | {name: row.get(name) for name in ("tokens", "before", "after")})
    return rows


def shift(rows: list[dict]) -> list[dict]:
    """How well the student does what the teacher would do, where the teacher alone made the history and elsewhere.

    Of the labels that there are: with --label-states student or uncertain:P these are a choice of states, and neither
    agree nor the likelihoods can be set against those of a run that labelled all.

    rows: of shift_rows. Returns, for history "teacher" (no turn of the student before this one; turn 0 is always of
    this kind) and "student" (at least one), the sum over all turns (turn None) and each turn:
    labels, tokens: how many were measured.
    before, after: the student's mean negative log-likelihood per label token (nats), before and after training on them.
        All tokens weigh the same, as in the loss of 03 (--loss-norm token); None where nothing was measured.
    compared, agree: the student's own turns, and the share of them at which the teacher's command is the same (equal
        text; an invalid label does not agree), None without one. Of all labels, not of the measured ones alone.
    If the student does worse where it made the history, that is the covariate shift that DAgger is about. Deeper turns
    are other turns (there one edits and submits): compare histories at the same turn.
    """
    lines = []
    for history in ("teacher", "student"):
        here = [row for row in rows if (row["student_turns"] > 0) == (history == "student")]
        for turn in (None, *sorted({row["turn"] for row in here})):
            group = [row for row in here if turn is None or row["turn"] == turn]
            seen = [row for row in group if row["tokens"] is not None]
            compared = [row["agrees"] for row in group if row["agrees"] is not None]
            if group:
                lines.append({
                    "history": history,
                    "turn": turn,
                    "labels": len(seen),
                    "tokens": sum(row["tokens"] for row in seen),
                    "before": _per_token(seen, "before"),
                    "after": _per_token(seen, "after"),
                    "compared": len(compared),
                    "agree": sum(compared) / len(compared) if compared else None,
                })  # fmt: skip
    return lines


def _per_token(rows: list[dict], when: str) -> float | None:
    known = [row for row in rows if row[when] is not None]
    tokens = sum(row["tokens"] for row in known)
    return sum(row[when] * row["tokens"] for row in known) / tokens if tokens else None


# ---------------------------------------------------------------------------------------------------------------------
# Arms

def arm_names(runs: list[Run]) -> list[str]:
    """A short name for the arm of each run; runs that differ in their seed alone have the same.

    Where two arms would be named alike, the settings in which they differ are added (in the iterations that both have);
    where even these are equal and so are the seeds, the commit (with a mark for uncommitted changes); and at last the
    second run of a seed gets its directory.
    """
    names = [_arm_name(found.settings) for found in runs]

    def added(name: str, mine: Run) -> str:
        """The settings in which a run differs from others of this name."""
        alike = [theirs for other, theirs in zip(names, runs) if other == name]
        here = [key for key in (*SETTINGS, "aggregate")
                if _value(mine, key) is not None and any(_differ(mine, theirs, key) for theirs in alike)]
        return "".join(f", {key.replace('_', ' ')} {_value(mine, key)}" for key in here)

    def twice() -> set[str]:
        arms = list(zip(names, (found.seed for found in runs)))
        return {name for name, seed in arms if arms.count((name, seed)) > 1}

    names = [name + added(name, found) for name, found in zip(names, runs)]
    codes = [found.settings.get("code") for found in runs]
    unclear = {name for name in twice() if len({code for other, code in zip(names, codes) if other == name}) > 1}
    names = [f"{name} ({code})" if name in unclear else name for name, code in zip(names, codes)]
    for words in ([found.name for found in runs], [str(found.home) for found in runs]):
        unclear, arms = twice(), list(zip(names, (found.seed for found in runs)))
        names = [f"{name} ({word})" if name in unclear and (name, seed) in arms[:place] else name
                 for place, ((name, seed), word) in enumerate(zip(arms, words))]  # fmt: skip
    return names


def _differ(one: Run, other: Run, name: str) -> bool:
    """Whether two runs have another value of a setting, as far as both of them say: their stages may not be there yet."""
    if name == "aggregate":  # a run of one iteration does not say: it would have been the same
        return None not in (one.settings[name], other.settings[name]) and one.settings[name] != other.settings[name]
    mine, theirs = one.of_iterations[name], other.of_iterations[name]
    if name in WHOLE:
        return bool(mine and theirs) and _value(one, name) != _value(other, name)
    default = DEFAULTS.get(name)
    return any((default if mine[i] is None else mine[i]) != (default if theirs[i] is None else theirs[i])
               for i in mine.keys() & theirs.keys())  # fmt: skip


def check_comparable(runs: list[Run]) -> None:
    """Raises InputError that names the first difference between these runs' evaluations, with both values.

    The tasks and their contents, who graded and for how long, the prompts, the agent's limits and the student's
    sampling must be equal; on the evaluation tasks in all iterations, and on the test tasks.
    """
    for pattern in ("iter_[0-9][0-9][0-9]/eval", "test/iter_[0-9][0-9][0-9]"):
        places = [place for found in runs for place in sorted(found.home.glob(pattern))]
        evaluations = [(place, content) for place in places if (content := table.manifest(place / "manifest.json"))]
        asked = [_conditions(content) for _, content in evaluations]
        for name in dict.fromkeys(name for found in asked for name in found):
            unknown = (None,) if name in ("grader", "sandbox") else ()  # older code did not say
            known = [place for place, found in enumerate(asked) if found.get(name) not in unknown]
            for place in known[1:]:
                if asked[place].get(name) != asked[known[0]].get(name):
                    both = [evaluations[known[0]], evaluations[place]]
                    if name == "tasks":  # the spec is for the eye, the contents decide
                        words = [f"{found['settings']['tasks']} (contents {found['same']['tasks']})" for _, found in both]
                    else:
                        words = [asked[known[0]].get(name), asked[place].get(name)]
                    what = "these runs" if len(runs) > 1 else "the iterations of this run"
                    raise InputError(
                        f"{what} cannot be compared: {name} is {words[0]} in {both[0][0]} and {words[1]} in "
                        f"{both[1][0]}; evaluate both alike (04_eval.py)"
                        + (", or look at one run at a time" if len(runs) > 1 else "")
                    )


def _conditions(manifest: dict) -> dict:
    """What has to be equal for two evaluations to be comparable. What one of them did not record is not compared."""
    same, summary = manifest["same"], manifest["summary"]
    flat = {
        "tasks": same["tasks"],
        "grader": summary.get("grader"),  # who graded, not what --grader said: `auto` and `local` may be the same
        "sandbox": summary.get("sandbox"),
        "swebench": same.get("swebench"),
        "test_timeout": same.get("test_timeout"),
        "prompts": same.get("prompts"),
    }
    flat |= {f"limit {name}": value for name, value in (same.get("limits") or {}).items()}
    student = same.get("student") or {}
    return flat | {f"sampling {name}": value for name, value in (student.get("sampling") or {}).items()}


def _arm_name(settings: dict) -> str:
    beta = settings.get("beta")
    schedule = settings.get("schedule") or ("paper" if beta is None else f"constant:{beta:g}")
    if settings.get("mix") == "turn" and schedule in ("constant:1", "constant:0"):  # --mix teacher and student by another name
        settings = settings | {"mix": "teacher" if schedule == "constant:1" else "student"}
    names = {"turn": f"DAgger {schedule}", "prefix": f"AggreVaTe {settings.get('prefix_turns')}", "teacher": "SFT",
             "student": "on-policy", None: "not collected"}  # fmt: skip
    name = names.get(settings.get("mix"), str(settings.get("mix")))
    if settings.get("acting"):
        name += f" ({settings['acting']} acting)"
    return name + (", resolved only" if settings.get("keep") == "resolved" else "")


def _value(found: Run, name: str):
    value = found.settings.get(name)
    return DEFAULTS.get(name) if value is None else value


def _settings(stages: dict[int, dict[str, dict]]) -> tuple[dict, int | None, dict[str, dict]]:
    """The settings that make a run's arm, the seed, and Run.of_iterations.

    What says who acts is taken from the last iteration (the first one may be shared between arms: at beta = 1 all are
    SFT); of all else the values of all iterations count, with commas between them where they differ.
    acting is who was the student while tasks were collected, label_teacher who gave the labels: None where these are the
    student that is scored and the teacher that acts.
    """
    last = {name: content for found in stages.values() for name, content in found.items()}

    def value(content: dict, name: str):
        found = content.get("same", {}).get("prompts") if name == "prompts" else content["settings"].get(name)
        return found and _who(found) if name in ("student", "teacher") else found

    def of_all(setting: str):
        values = list(every[setting].values())
        shown = dict.fromkeys(str(DEFAULTS.get(setting) if one is None else one) for one in values)
        return ",".join(shown) if len(shown) > 1 else values[-1] if values else None

    every = {setting: {i: value(found[stage], name) for i, found in stages.items() if stage in found}
             for setting, (stage, name) in SETTINGS.items()}  # fmt: skip
    settings = {setting: of_all(setting) for setting in SETTINGS}
    settings |= {name: last["collect"]["settings"].get(name) for name in ("mix", *OF_MIX) if "collect" in last}
    settings |= {name: None for name, mix in OF_MIX.items() if settings["mix"] != mix}
    settings["student"] = value(last["eval"], "student") if "eval" in last else settings["acting"]
    actors = [found["collect"]["settings"].get("student") for found in stages.values() if "collect" in found]
    others = [_who(actor) for actor in actors if actor and _model(actor) != _model(settings["student"] or actor)]
    settings["acting"] = ",".join(dict.fromkeys(others)) or None
    if settings["label_teacher"] == (settings["teacher"] or settings["label_teacher"]):
        settings |= {"teacher": settings["label_teacher"] or settings["teacher"], "label_teacher": None}
    if last.get("relabel", {}).get("settings", {}).get("keep") == "resolved":  # 02 or 03 may have left the others out
        settings["keep"] = "resolved"
    settings["aggregate"] = _aggregation({i: found["train"] for i, found in stages.items() if "train" in found})
    seeds = [seed for content in last.values() if (seed := content["settings"].get("seed")) is not None]
    made = last.get("collect") or next(iter(last.values()))
    commit, diff = made.get("commit"), made.get("diff")
    settings["code"] = commit and f"{commit[:9]}" + (f" with changes {run.hash_json(diff)[:4]}" if diff else "")
    return settings, seeds[0] if seeds else None, every


def _who(policy: str) -> str:
    """A policy without what only says how it is run, or which iteration's it is: address, GPUs, adapter."""
    kind, _, rest = policy.partition(":")
    if kind == "openai":
        return f"openai:{rest.partition('@')[0]}"
    if kind == "vllm":
        return f"vllm:{rest.partition(',')[0]}"
    return re.sub(r",adapter=[^,]*", "", policy) if kind == "hf" else policy


def _model(policy: str) -> str:
    return _who(policy).partition(",")[0] if policy.startswith("hf:") else _who(policy)


def _aggregation(trained: dict[int, dict]) -> str | None:
    """union, window:K or current, of the last iteration that was trained; None before the second, where all are one."""
    if not trained or max(trained) < 2:
        return None
    settings = trained[max(trained)]["settings"]
    if settings.get("init_adapter"):
        return "current"
    return "union" if len(settings["data"]) >= max(trained) else f"window:{len(settings['data'])}"


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of a summary

def _iteration(home: Path, number: int) -> Path:
    return home / f"iter_{number:03d}"


def _scores(manifest: dict | None) -> dict | None:
    """The summary of an evaluation, and the tasks that it is on."""
    return manifest and {"on": manifest["settings"]["tasks"], "seconds": manifest["seconds"]} | manifest["summary"]


def _cost(summary: dict[str, dict | None]) -> dict | None:
    """See summarise."""
    if not any(summary.values()):
        return None

    def total(*parts: tuple[str, str]) -> dict[str, int | None]:
        tokens = {}
        for kind in TOKENS:
            numbers = [summary[stage].get(name + kind) for stage, name in parts if summary[stage]]
            tokens[kind] = sum(numbers) if numbers and None not in numbers else None
        return tokens

    if summary["collect"]:  # with --inline alone
        summary = summary | {"collect": {f"inline_{kind}": 0 for kind in TOKENS} | summary["collect"]}
    priced = [found["cost"] for found in summary.values() if found and "cost" in found]
    return {
        "teacher": total(("collect", "teacher_tokens_"), ("collect", "inline_"), ("labels", "tokens_")),
        "student": total(("collect", "student_tokens_")),
        "eval": total(("eval", "tokens_")),
        "dollars": sum(priced) if priced else None,
        "seconds": {name: found and found["seconds"] for name, found in summary.items()},
    }
