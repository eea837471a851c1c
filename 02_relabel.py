"""Stage 2 of DAgger: the teacher's action at every state that was visited, whoever acted there.

Where the teacher acted, its executed turn already is a sample of pi_e(.|s_t) and is the label. Where the student acted,
the teacher is asked at exactly that state: the conversation before the turn. No label ever comes from the student.

Which states get a label is the budget of the teacher. --label-states student leaves out those where the teacher acted
(but takes all where the student never acted, as in iteration 1: there would be nothing to train on). uncertain:P keeps
those of the teacher (whose executed turns cost nothing) and, of the student's turns, the share P with the lowest mean
log-probability per token that the student itself gave them when it acted, in the spirit of SafeDAgger and ThriftyDAgger,
but looking back on a finished collection. `hf:` records it, servers are asked for it; a turn without one counts as the
least certain, and where no turn has one, uncertain:P is refused. --keep resolved takes trajectories that resolved their
task alone. --max-labels N takes whole trajectories in an order drawn from the seed until there are N labels, and cuts the
last one; for every label that turns out not to be valid one more is taken, as long as there are states.

reads   --trajectories FILE...: what 01_collect.py wrote; with --keep resolved also grades/results.jsonl beside each
writes  --out FILE: one label a line, in the order of trajectories and turns; FILE.manifest.json, FILE.log beside it

    python 02_relabel.py --trajectories runs/laptop/iter_001/trajectories.jsonl --teacher oracle --out labels.jsonl
    python 02_relabel.py --trajectories t.jsonl --teacher openai:MODEL@http://localhost:8000/v1 --out labels.jsonl

A label must be a good action: one that is cut off, empty or without exactly one command is asked for again, twice; then
it is kept with valid: false and never trained on. Equal states are asked once, over all runs that share a --cache. Stop
at any moment: the same command goes on.
"""

import math
from dataclasses import dataclass
from typing import Literal

from common import mixing, run, schema
from common.policies import PolicyFlags, TeacherFlags


@dataclass(kw_only=True)
class Args(TeacherFlags, PolicyFlags):
    trajectories: list[str]
    """trajectory files"""
    teacher: str
    """policy of the teacher"""
    out: str
    """the labels file to write"""
    cache: str | None = None
    """directory that keeps the teacher's answers: a state that was asked before, by any run, is not asked again"""
    fresh: bool = False
    """ask anew for what is in the cache, and replace it there"""
    temperature: float | None = None
    """sampling temperature (default: the recorded one of the teacher)"""
    top_p: float | None = None
    """nucleus sampling (default: the recorded one of the teacher)"""
    label_states: str = "all"
    """which visited states get a label: all; student (those where the student acted; all where it never did); or
    uncertain:P (those where the teacher acted, and of the student's the share P of which it was least certain)"""
    keep: Literal["all", "resolved"] = "all"
    """resolved: only states of trajectories that grades/results.jsonl beside --trajectories says resolved their task"""
    max_labels: int | None = None
    """at most this many valid labels, drawn by the seed"""
    workers: int = 8
    """trajectories at once; the states of one are asked in order"""
    seed: int = 0
    """seed of the teacher's sampling and of the choice of --max-labels"""
    infra_retries: int = 2
    """further rounds for trajectories that the machine failed"""
    max_infra: float = 0.05
    """share of trajectories that may stay undone for the machine's sake"""
    overwrite: bool = False
    """start again, whatever is there"""


def label_states(trajectory: dict):
    """Yield (turn, state, executed): the messages before each assistant turn, and that turn as it was executed."""
    for place, message in enumerate(trajectory["messages"]):
        if message["role"] == "assistant":
            yield message["turn"], trajectory["messages"][:place], message


def choose_states(args: Args, trajectories: dict[str, dict], spoilt: int = 0) -> list[tuple[str, int]]:
    """(trajectory_id, turn) of the states that get a label, in the order of the files; the docstring above says which.

    spoilt: labels that are not valid, for which as many more may be taken than --max-labels says.
    Raises InputError for an unknown --label-states, and where nothing is left.
    """
    from common.errors import InputError

    kind, _, text = args.label_states.partition(":")
    turns = {name: [executed for _, _, executed in label_states(record)] for name, record in trajectories.items()}
    of_student = [(name, m) for name in turns for m in turns[name] if m["actor"] == "student"]
    if args.label_states == "all":
        chosen = {(name, m["turn"]) for name in turns for m in turns[name]}
    elif args.label_states == "student":
        chosen = {(name, m["turn"]) for name, m in of_student or [(name, m) for name in turns for m in turns[name]]}
    elif kind == "uncertain":
        chosen = {(name, m["turn"]) for name in turns for m in turns[name] if m["actor"] == "teacher"}
        chosen |= most_uncertain(args, of_student, text)
    else:
        raise InputError(f"--label-states {args.label_states!r} is none of all, student, uncertain:P")
    names = list(turns)
    if args.max_labels is not None:
        names.sort(key=lambda name: mixing.derive("max-labels", args.seed, name))
    budget = math.inf if args.max_labels is None else args.max_labels + spoilt
    for name in names:
        for turn in (m["turn"] for m in turns[name]):
            budget -= (name, turn) in chosen
            if budget < 0:
                chosen.discard((name, turn))
    if not chosen:
        raise InputError(f"{' '.join(args.trajectories)}: --label-states {args.label_states} leaves no state to label")
    return [(name, m["turn"]) for name in turns for m in turns[name] if (name, m["turn"]) in chosen]


def most_uncertain(args: Args, of_student: list[tuple[str, dict]], share: str) -> set[tuple[str, int]]:
    """The share of the student's turns, rounded up, at which it was least certain; of equals the earlier ones."""
    from common.errors import InputError

    try:
        number = float(share)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise InputError(f"--label-states {args.label_states!r}: P in uncertain:P is a share, more than 0 and at most 1")
    known = [m["logprob"] for _, m in of_student if m["logprob"] is not None]
    if of_student and not known:
        raise InputError(f"--label-states {args.label_states}: no turn of the student in {' '.join(args.trajectories)} has "
                         "a log-probability (hf: records it, a server must be able to give logprobs); take all or student")
    ranked = sorted(of_student, key=lambda turn: -math.inf if turn[1]["logprob"] is None else turn[1]["logprob"])
    return {(name, m["turn"]) for name, m in ranked[: math.ceil(number * len(ranked))]}


def work(args: Args) -> None:
    from pathlib import Path

    from common import actions, cache, cost, jsonl, labels, policies, stage_tools
    from common.errors import InputError

    stage_tools.check_numbers(args)
    trajectories = {}
    for path in args.trajectories:
        for record in jsonl.read(path, "trajectory"):
            if record["trajectory_id"] in trajectories:
                raise InputError(f"{path}: trajectory_id {record['trajectory_id']!r} is there twice")
            trajectories[record["trajectory_id"]] = record
    if not trajectories:
        raise InputError(f"{' '.join(args.trajectories)}: no trajectory in there")

    recorded = next(iter(trajectories.values()))
    selection = {name: getattr(args, name) for name in ("label_states", "keep", "max_labels")
                 if getattr(args, name) not in ("all", None)}  # fmt: skip
    if args.keep == "resolved":
        homes = [Path(path).parent for path in args.trajectories]
        kept = set().union(*(stage_tools.resolved(path, trajectories) for path in args.trajectories))
        trajectories = {name: record for name, record in trajectories.items() if name in kept}
        selection["grades"] = [run.hash_file(home / "grades/results.jsonl") for home in homes]
        if not trajectories:
            raise InputError(f"{' '.join(args.trajectories)}: --keep resolved, and none of these resolved its task")
    order = choose_states(args, trajectories)
    selected = set(order)
    then = schema.asked(recorded, f"{args.trajectories[0]}: {recorded['trajectory_id']}")
    teacher = policies.open_policy(
        args.teacher, role="teacher", batch=args.workers, **args.options("teacher"),
        **then | {name: given for name in ("temperature", "top_p") if (given := getattr(args, name)) is not None},
    )  # fmt: skip

    meter = cost.Meter(args.out, args.price, args.max_cost)
    same = {
        "trajectories": [run.hash_file(path) for path in args.trajectories],
        "teacher": teacher.describe(),
        "seed": args.seed,
        **selection,
    }
    output = jsonl.Output(args.out, "label", key=lambda r: (r["trajectory_id"], r["turn"]))
    stage = run.Stage(args.out, args, same, overwrite=args.overwrite, outputs=(output,))
    if stage.done and output.finished:
        return stage.say_done()
    output.open(stage.resumed)
    meter.open(args.overwrite)
    answers = cache.Cache(args.cache, args.fresh)
    count = stage_tools.token_counter(stage, stage_tools.RecordedStudent(recorded["student"]), teacher)
    labeller = labels.Labeller(meter.watch(teacher), answers, args.seed, count)

    def label(trajectory: dict, turn: int, state: list[dict], executed: dict) -> dict:
        """The teacher's action at one visited state."""
        record = {
            "schema": schema.VERSION,
            "trajectory_id": trajectory["trajectory_id"],
            "instance_id": trajectory["instance_id"],
            "iteration": trajectory["iteration"],
            "turn": turn,
            "teacher": same["teacher"],
        }
        by_teacher = executed["actor"] == "teacher"
        reason = actions.wrong_with(executed["content"], executed["finish_reason"])
        if by_teacher and trajectory["teacher"] == same["teacher"] and reason is None:
            return record | {
                "label": executed["content"],
                "valid": True,
                "reason": None,
                "source": "executed",
                "tokens": executed["tokens"],
                "seconds": executed["seconds"],
                "agrees": None,
            }
        task = {name: trajectory[name] for name in ("instance_id", "base_commit")}
        chat = [{"role": m["role"], "content": m["content"]} for m in state]
        asked = labeller.label(task, trajectory["prompt"], chat, episode=trajectory["trajectory_id"], turn=turn,
                               attempt=trajectory["attempt"])  # fmt: skip
        same_command = asked["valid"] and actions.parse(asked["label"]) == executed["command"]
        return record | asked | {"agrees": None if by_teacher else same_command}

    def relabel(trajectory_id: str):
        """The labels of one trajectory, in the order of its turns, so that a prefix cache stays warm."""
        try:
            for turn, state, executed in label_states(trajectories[trajectory_id]):
                if (trajectory_id, turn) in selected and (trajectory_id, turn) not in output:
                    yield label(trajectories[trajectory_id], turn, state, executed)
        finally:
            teacher.forget(trajectory_id)

    acted = any(m["actor"] == "student" for name in trajectories for _, _, m in label_states(trajectories[name]))
    if args.label_states == "student" and not acted:
        stage.log.warning("the student never acted in these trajectories: all their states get a label")
    if args.max_labels is not None and len(order) < args.max_labels:
        stage.log.warning("there are %d states to label, fewer than --max-labels %d", len(order), args.max_labels)
    while True:
        names = list(dict.fromkeys(name for name, _ in order))
        todo = list(dict.fromkeys(name for name, turn in order if (name, turn) not in output))
        left = stage_tools.run_jobs(args, stage, output, names, todo, relabel, args.workers, "relabel", _postfix, meter)
        if args.max_labels is None:
            break
        spoilt = sum(not record["valid"] for record in output.records(order))
        more = choose_states(args, trajectories, spoilt)
        if len(more) == len(order):
            break
        order, selected = more, set(more)

    summary = measure(output.records(order)) | {"missing": sum(key not in output for key in order), "infra_errors": left}
    output.finish(order)
    stage.finish(summary | meter.summary())


def _postfix(record: dict) -> dict:
    return {
        "labels": 1,
        "asked": record["source"] == "queried",
        "invalid": not record["valid"],
        "agree": bool(record["agrees"]),
        "tokens": record["tokens"]["out"] if record["source"] == "queried" else 0,
    }


def measure(labels) -> dict:
    """Labelled states and trajectories, counts by source; agree is the share of the student's turns at which the teacher
    gives the same command.

    Tokens and seconds are those of what was asked here; a label from the cache costs nothing, an executed one was paid for
    when it was executed.
    """
    sources = dict.fromkeys(schema.SOURCES, 0)
    asked = {"in": 0, "cached": 0, "out": 0}
    states, invalid, seconds = 0, 0, 0.0
    compared: list[bool] = []
    trajectories: set[str] = set()
    for label in labels:
        states += 1
        trajectories.add(label["trajectory_id"])
        sources[label["source"]] += 1
        invalid += not label["valid"]
        compared += [label["agrees"]] if label["agrees"] is not None else []
        if label["source"] == "queried":
            seconds += label["seconds"]
            for kind in asked:
                asked[kind] += label["tokens"][kind] or 0
    return {
        "states": states,
        "trajectories": len(trajectories),
        "executed": sources["executed"],
        "queried": sources["queried"],
        "cached": sources["cache"],
        "invalid": invalid,
        "agree": sum(compared) / len(compared) if compared else None,
        **{f"tokens_{kind}": number for kind, number in asked.items()},
        "teacher_seconds": seconds,
    }


if __name__ == "__main__":
    run.main(Args, work)
