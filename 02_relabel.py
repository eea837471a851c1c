"""Stage 2 of DAgger: the teacher's action at every state that was visited, whoever acted there.

Where the teacher acted, its executed turn already is a sample of pi_e(.|s_t) and is the label. Where the student acted,
the teacher is asked at exactly that state: the conversation before the turn. No label ever comes from the student.

reads   --trajectories FILE...: what 01_collect.py wrote
writes  --out FILE: one label a line, in the order of trajectories and turns; FILE.manifest.json, FILE.log beside it

    python 02_relabel.py --trajectories runs/laptop/iter_001/trajectories.jsonl --teacher oracle --out labels.jsonl
    python 02_relabel.py --trajectories t.jsonl --teacher openai:MODEL@http://localhost:8000/v1 --out labels.jsonl

A label must be a good action: one that is cut off, empty or without exactly one command is asked for again, twice; then
it is kept with valid: false and never trained on. Equal states are asked once, over all runs that share a --cache. Stop
at any moment: the same command goes on.
"""

from dataclasses import dataclass

from common import run, schema
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
    workers: int = 8
    """trajectories at once; the states of one are asked in order"""
    seed: int = 0
    """seed of the teacher's sampling"""
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


def work(args: Args) -> None:
    from common import actions, cache, cost, jsonl, labels, policies, stage_tools
    from common.errors import InputError

    stage_tools.check_counts(args, "workers")
    trajectories = {}
    for path in args.trajectories:
        for record in jsonl.read(path, "trajectory"):
            if record["trajectory_id"] in trajectories:
                raise InputError(f"{path}: trajectory_id {record['trajectory_id']!r} is there twice")
            trajectories[record["trajectory_id"]] = record
    if not trajectories:
        raise InputError(f"{' '.join(args.trajectories)}: no trajectory in there")

    recorded = next(iter(trajectories.values()))
    sampling = (recorded["teacher"] or recorded["student"])["sampling"]
    teacher = policies.open_policy(
        args.teacher, role="teacher", batch=args.workers, **args.options("teacher"),
        temperature=sampling["temperature"] if args.temperature is None else args.temperature,
        top_p=sampling["top_p"] if args.top_p is None else args.top_p,
        max_new_tokens=recorded["limits"]["max_new_tokens"], max_context=recorded["limits"]["max_context"],
    )  # fmt: skip

    meter = cost.Meter(args.out, args.price, args.max_cost)
    same = {
        "trajectories": [run.hash_file(path) for path in args.trajectories],
        "teacher": teacher.describe(),
        "seed": args.seed,
    }
    output = jsonl.Output(args.out, "label", key=lambda r: (r["trajectory_id"], r["turn"]))
    stage = run.Stage(args.out, args, same, overwrite=args.overwrite)
    if args.overwrite:
        output.remove()
    if stage.done and output.finished:
        return stage.say_done()
    output.open()
    meter.open(args.overwrite)
    answers = cache.Cache(args.cache, args.fresh)
    labeller = labels.Labeller(meter.watch(teacher), answers, args.seed, stage_tools.token_counter(teacher))

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
                if (trajectory_id, turn) not in output:
                    yield label(trajectories[trajectory_id], turn, state, executed)
        finally:
            teacher.forget(trajectory_id)

    order = [(name, turn) for name, record in trajectories.items() for turn, _, _ in label_states(record)]
    todo = list(dict.fromkeys(name for name, turn in order if (name, turn) not in output))
    left = stage_tools.run_jobs(args, stage, output, list(trajectories), todo, relabel, args.workers, "relabel", _postfix, meter)

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
    """Counts by source; agree is the share of the student's turns at which the teacher gives the same command.

    Tokens and seconds are those of what was asked here; a label from the cache costs nothing, an executed one was paid for
    when it was executed.
    """
    sources = dict.fromkeys(schema.SOURCES, 0)
    asked = {"in": 0, "cached": 0, "out": 0}
    states, invalid, seconds = 0, 0, 0.0
    compared: list[bool] = []
    for label in labels:
        states += 1
        sources[label["source"]] += 1
        invalid += not label["valid"]
        compared += [label["agrees"]] if label["agrees"] is not None else []
        if label["source"] == "queried":
            seconds += label["seconds"]
            for kind in asked:
                asked[kind] += label["tokens"][kind] or 0
    return {
        "states": states,
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
