"""Stage 2 of DAgger: the teacher's action at every state that was visited, whoever acted there.

Where the teacher acted, its executed turn already is a sample of pi_e(.|s_t) and is the label. Where the student acted,
the teacher is asked at exactly that state: the conversation before the turn. No label ever comes from the student.

reads   --trajectories FILE...: what 01_collect.py wrote
writes  --out FILE: one label a line, in the order of trajectories and turns; FILE.manifest.json, FILE.log beside it

    python 02_relabel.py --trajectories runs/laptop/iter_001/trajectories.jsonl --teacher oracle --out labels.jsonl
    python 02_relabel.py --trajectories t.jsonl --teacher openai:MODEL@http://localhost:8000/v1 --out labels.jsonl

A label must be a good action: one that is cut off, empty or without exactly one command is asked for again, twice; then
it is kept with valid: false and never trained on. Stop at any moment: the same command goes on.
"""

from dataclasses import dataclass

from common import run, schema
from common.policies import PolicyFlags, TeacherFlags

TRIES = 3


@dataclass(kw_only=True)
class Args(TeacherFlags, PolicyFlags):
    trajectories: list[str]
    """trajectory files"""
    teacher: str
    """policy of the teacher"""
    out: str
    """the labels file to write"""
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
    from common import actions, jsonl, mixing, policies, stage_tools
    from common.chat import harmless
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
    count = stage_tools.token_counter(teacher)

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
        tokens, seconds, text = {"in": 0, "cached": 0, "out": 0}, 0.0, ""
        for attempt in range(TRIES):
            place = (args.seed, trajectory["trajectory_id"], turn, "teacher", "label", attempt)
            try:
                answer = teacher.act(task, chat, turn=turn, seed=mixing.derive("sample", *place),
                                     episode=trajectory["trajectory_id"], attempt=trajectory["attempt"])  # fmt: skip
            except policies.ContextLimit:
                reason = "the state exceeds the teacher's context"
                break
            text = harmless(answer.text)
            out = count(text) if answer.tokens_out is None else answer.tokens_out
            for name, number in (("in", answer.tokens_in), ("cached", answer.tokens_cached), ("out", out)):
                tokens[name] += number or 0
            seconds += answer.seconds
            reason = actions.wrong_with(text, answer.finish_reason)
            if reason is None:
                break
        return record | {
            "label": text,
            "valid": reason is None,
            "reason": reason,
            "source": "queried",
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "agrees": None if by_teacher else reason is None and actions.parse(text) == executed["command"],
        }

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
    left = stage_tools.run_jobs(args, stage, output, list(trajectories), todo, relabel, args.workers, "relabel", _postfix)

    summary = measure(output.records(order)) | {"missing": sum(key not in output for key in order), "infra_errors": left}
    output.finish(order)
    stage.finish(summary)


def _postfix(record: dict) -> dict:
    return {
        "labels": 1,
        "asked": record["source"] == "queried",
        "invalid": not record["valid"],
        "agree": bool(record["agrees"]),
    }


def measure(labels) -> dict:
    """Counts by source; agree is the share of the student's turns at which the teacher gives the same command."""
    states = executed = queried = cached = invalid = tokens = 0
    compared: list[bool] = []
    for label in labels:
        states += 1
        executed += label["source"] == "executed"
        queried += label["source"] == "queried"
        cached += label["source"] == "cache"
        invalid += not label["valid"]
        tokens += label["tokens"]["out"] if label["source"] == "queried" else 0
        compared += [label["agrees"]] if label["agrees"] is not None else []
    return {
        "states": states,
        "executed": executed,
        "queried": queried,
        "cached": cached,
        "invalid": invalid,
        "agree": sum(compared) / len(compared) if compared else None,
        "tokens_out": tokens,
    }


if __name__ == "__main__":
    run.main(Args, work)
