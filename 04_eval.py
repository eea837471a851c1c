"""Stage 4: score the student, alone and greedy, on held-out tasks; or grade patches that somebody made.

A task is resolved if all its FAIL_TO_PASS and PASS_TO_PASS tests pass, in a clean checkout with the patch, after every
file of the test patch was put back. The rate comes with its 95 % Wilson interval.

reads   --tasks, and --student P (a policy), --predictions FILE (SWE-bench's format) or --trajectories FILE
writes  --out DIR: trajectories.jsonl predictions.jsonl results.jsonl logs/INSTANCE.txt summary.json manifest.json

    python 04_eval.py --tasks toy:dev --student hf:smollm2-135m --out runs/laptop/iter_000/eval
    python 04_eval.py --tasks toy:dev --student hf:smollm2-135m,adapter=runs/laptop/iter_001/adapter --out eval
    python 04_eval.py --tasks mine.jsonl --predictions predictions.jsonl --out graded

Stop it at any moment: the same command goes on.
"""

import json
import time
from dataclasses import dataclass
from typing import Literal

from common import mixing, run, schema
from common.agent import AgentFlags


@dataclass(kw_only=True)
class Args(AgentFlags):
    tasks: str
    """toy:train|dev|test|study, swe-bench-verified, swe-bench-lite, swe-gym:train|holdout, swe-gym-lite,
    dataset:NAME:SPLIT, or a .jsonl, .json or .parquet file; each may end in :N"""
    out: str
    """the directory to write"""
    student: str | None = None
    """policy to score (any policy: `oracle` scores the teacher)"""
    predictions: str | None = None
    """grade the patches of this file instead"""
    trajectories: str | None = None
    """grade the patches of these trajectories instead"""
    grader: Literal["auto", "local"] = "auto"
    """who grades: local runs the tests here, in the sandbox"""
    iteration: int = 0
    """DAgger iteration of the student; recorded"""
    limit: int | None = None
    """take the first N tasks"""
    temperature: float = 0.0
    """sampling temperature; 0 is greedy"""
    top_p: float = 1.0
    """nucleus sampling"""
    teacher_key_env: str = "OPENAI_API_KEY"
    """environment variable with the key of an openai: policy"""
    test_timeout: float = 120.0
    """seconds that the tests of one task may take"""
    workers: int = 8
    """trajectories at once"""
    seed: int = 0
    """seed of the sampling, where there is any"""
    infra_retries: int = 2
    """further rounds for tasks that the machine failed"""
    max_infra: float = 0.05
    """share of tasks that may stay undone for the machine's sake"""
    overwrite: bool = False
    """start again, whatever is there"""


def work(args: Args) -> None:
    from pathlib import Path

    from common import jsonl, policies, prompts, sandbox, stage_tools, tasks
    from common.errors import InputError

    stage_tools.check_counts(args, "workers", "max_turns")
    if sum(source is not None for source in (args.student, args.predictions, args.trajectories)) != 1:
        raise InputError("give exactly one of --student, --predictions and --trajectories")
    rows = {row["instance_id"]: row for row in tasks.load(args.tasks, args.limit)}
    if args.student:
        sandbox.prepare(list(rows.values()), args.sandbox, check_images=args.check_images, evict_images=args.evict_images)
    student = given = None
    if args.student:
        student = policies.open_policy(
            args.student, role="student", batch=args.workers, key_env=args.teacher_key_env,
            temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens,
            max_context=args.max_context,
        )  # fmt: skip
    else:
        given = _read_patches(args, rows)

    same = {
        "tasks": tasks.hash_rows(list(rows.values())),
        "grader": args.grader,
        "test_timeout": args.test_timeout,
        "iteration": args.iteration,
        **{name: run.hash_file(path) if path else None
           for name, path in (("predictions", args.predictions), ("trajectories", args.trajectories))},
    }  # fmt: skip
    if student:
        same |= {
            "prompts": sorted({prompts.version(row) for row in rows.values()}),
            "sandbox": args.sandbox,
            "seed": args.seed,
            "limits": args.limits(),
            "student": student.describe(),
        }
    out = Path(args.out)
    output = jsonl.Output(out / "results.jsonl", "result", key=lambda r: (r["instance_id"], r["trajectory_id"]))
    rollouts = jsonl.Output(out / "trajectories.jsonl", "trajectory", key=lambda r: (r["instance_id"],))
    stage = run.Stage(args.out, args, same, directory=True, overwrite=args.overwrite)
    if args.overwrite:
        output.remove()
        rollouts.remove()
    if stage.done and output.finished:
        return stage.say_done()
    (out / "logs").mkdir(exist_ok=True)

    if student:
        if not rollouts.finished:
            roll_out(args, stage, rollouts, student, rows)
        given = list(jsonl.read(rollouts.path, "trajectory"))
        name = args.student
        lines = [{"instance_id": r["instance_id"], "model_name_or_path": name, "model_patch": r["patch"]} for r in given]
        jsonl.write_atomically(out / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    output.open()
    results, left = grade_all(args, stage, output, rows, given)
    summary = measure(rows, results, infra_errors=left + (len(rows) - len(given) if student else 0))
    output.finish([output.key(result) for result in results])
    jsonl.write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    stage.finish(summary)


def roll_out(args: Args, stage, rollouts, student, rows: dict[str, dict]) -> None:
    """The student alone on every task, into trajectories.jsonl."""
    from common import agent, stage_tools

    rollouts.open()
    count = stage_tools.token_counter(student)
    described = student.describe()

    def collect(job: tuple[str]) -> list[dict]:
        (instance_id,) = job
        row = rows[instance_id]
        place = (args.seed, args.iteration, instance_id, 0)
        episode = "/".join(map(str, place))

        def ask(turn: int, chat: list[dict]) -> tuple:
            seed = mixing.derive("sample", *place, turn, "student", "act")
            return "student", student.act(row, chat, seed=seed, episode=episode, turn=turn, attempt=0)

        head = {
            "iteration": args.iteration,
            "attempt": 0,
            "seed": args.seed,
            "mix": "student",
            "beta": 0.0,
            "student": described,
            "teacher": None,
        }
        try:
            return [agent.trajectory(row, head, ask, args, count)]
        finally:
            student.forget(episode)

    def postfix(record: dict) -> dict:
        turns = [m for m in record["messages"] if m["role"] == "assistant"]
        return {
            "submitted": record["exit_status"] == "submitted",
            "turns": len(turns),
            "tokens": sum(m["tokens"]["out"] for m in turns),
        }

    jobs = [(name,) for name in rows]
    todo = [job for job in jobs if job not in rollouts]
    stage_tools.run_jobs(args, stage, rollouts, jobs, todo, collect, args.workers, "roll out", postfix)
    rollouts.finish(jobs)


def grade_all(args: Args, stage, output, rows: dict[str, dict], given: list[dict]) -> tuple[list[dict], int]:
    """Grade every patch; returns the results in order and how many the machine left undone."""
    import os
    from pathlib import Path

    from common import grading, stage_tools

    by_key = {(record["instance_id"], record.get("trajectory_id")): record for record in given}

    def grade(key: tuple) -> list[dict]:
        record, started = by_key[key], time.time()
        patch = record["patch"] if "patch" in record else record["model_patch"] or ""
        verdict = grading.grade(rows[record["instance_id"]], patch, timeout=args.test_timeout)
        name = record.get("trajectory_id") if args.trajectories else record["instance_id"]
        (Path(args.out) / "logs" / f"{name}.txt").write_text(verdict["log"], encoding="utf-8", errors="replace")
        turns = [m for m in record.get("messages", []) if m["role"] == "assistant"]
        return [
            {
                "schema": schema.VERSION,
                "instance_id": record["instance_id"],
                "trajectory_id": record.get("trajectory_id"),
                "resolved": verdict["resolved"],
                "tests_status": verdict["tests_status"],
                "exit_status": record.get("exit_status"),
                "failure_mode": failure_mode(record.get("exit_status"), patch, verdict),
                "turns": len(turns) if "messages" in record else None,
                "tokens": {
                    kind: sum(m["tokens"][kind] or 0 for m in turns) for kind in ("in", "cached", "out")
                } if "messages" in record else None,
                "seconds": round(record["finished"] - record["started"] if "started" in record else time.time() - started, 3),
                "tampered": verdict["tampered"],
            }
        ]  # fmt: skip

    todo = [key for key in by_key if key not in output]
    workers = min(args.workers, os.cpu_count() or 1)  # tests are work for a core, not a wait
    left = stage_tools.run_jobs(
        args, stage, output, list(by_key), todo, grade, workers, "grade", lambda r: {"resolved": r["resolved"]}
    )
    return list(output.records(list(by_key))), left


def failure_mode(exit_status: str | None, patch: str, verdict: dict) -> str | None:
    """Why a task is not resolved; None if it is.

    no_patch: nothing was changed. patch_not_applied: the patch does not apply to a clean checkout. turn_limit, ...:
    the episode did not end by submitting. tests_failed: it was submitted, and a test fails.
    """
    if verdict["resolved"]:
        return None
    if not patch.strip():
        return "no_patch"
    if not verdict["patch_applied"]:
        return "patch_not_applied"
    if exit_status not in (None, "submitted"):
        return exit_status
    return "tests_failed"


def measure(rows: dict[str, dict], results: list[dict], infra_errors: int) -> dict:
    """Resolved with its interval; by family and by whether the family is in the training split; how episodes ended."""
    from common.metrics import rate

    def counted(field: str, prefix: str = "") -> dict:
        values = [result[field] for result in results if result[field] is not None]
        return {prefix + value: values.count(value) for value in sorted(set(values))}

    groups: dict[str, list[bool]] = {}
    for result in results:
        row = rows[result["instance_id"]]
        if "family" in row:
            seen = "families not in train" if row.get("unseen_family") else "families in train"
            for name in (seen, f"family {row['family']}"):
                groups.setdefault(name, []).append(result["resolved"])
    resolved = sum(result["resolved"] for result in results)
    return {
        "tasks": len(results) + infra_errors,
        "resolved": resolved,
        **rate(resolved, len(results)),
        "infra_errors": infra_errors,
        "tampered": sum(result["tampered"] for result in results),
        "turns": sum(result["turns"] or 0 for result in results),
        "tokens_out": sum((result["tokens"] or {"out": 0})["out"] for result in results),
        **counted("exit_status", "exit_"),
        "failure_modes": counted("failure_mode"),
        "groups": {
            name: {"tasks": len(group), "resolved": sum(group), **rate(sum(group), len(group))}
            for name, group in sorted(groups.items())
        },
    }


def _read_patches(args: Args, rows: dict[str, dict]) -> list[dict]:
    """The records of --predictions (one a task; a task without one gets an empty patch) or --trajectories."""
    from common import jsonl
    from common.errors import InputError

    path = args.predictions or args.trajectories
    given, seen = [], set()
    for number, record in enumerate(jsonl.read(path, "prediction" if args.predictions else "trajectory"), start=1):
        name = record["instance_id"]
        key = name if args.predictions else record["trajectory_id"]
        if name not in rows:
            raise InputError(f"{path}:{number}: instance_id {name!r} is not in --tasks {args.tasks}")
        if key in seen:
            raise InputError(f"{path}:{number}: {key!r} is there twice")
        seen.add(key)
        given.append(record)
    if args.predictions:
        given += [{"instance_id": name, "model_patch": ""} for name in rows if name not in seen]
    return given


if __name__ == "__main__":
    run.main(Args, work)
