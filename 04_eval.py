"""Stage 4: score the student, alone and greedy, on held-out tasks; or grade patches that somebody made.

A task is resolved if all its FAIL_TO_PASS and PASS_TO_PASS tests pass, in a clean checkout with the patch, after every
file of the test patch was put back. The rate comes with its 95 % Wilson interval. An empty patch is unresolved, and
nothing is run for it.

Two graders. `local` (common/grading.py) needs a task with `local` and believes nothing that a patched program prints.
`swebench` (common/official.py) is SWE-bench's official harness in Docker, verbatim: the number to quote, with its known
weaknesses. `auto` takes `local` where a row has it. --regrade works the results out again from the saved logs.

reads   --tasks, and --student P (a policy), --trajectories FILE or --predictions FILE (SWE-bench's format: JSONL, a
        JSON list, or mini-swe-agent's object instance_id -> prediction)
writes  --out DIR: trajectories.jsonl predictions.jsonl results.jsonl logs/INSTANCE.txt summary.json manifest.json, and
        swebench/INSTANCE/ with all that the official harness read and wrote

    python 04_eval.py --tasks toy:dev --student hf:smollm2-135m --out runs/laptop/iter_000/eval
    python 04_eval.py --tasks toy:dev --student hf:smollm2-135m,adapter=runs/laptop/iter_001/adapter --out eval
    python 04_eval.py --tasks mine.jsonl --predictions predictions.jsonl --out graded
    python 04_eval.py --tasks swe.jsonl --predictions preds.json --grader swebench --out graded

Stop it at any moment: the same command goes on.
"""

import json
import time
from dataclasses import dataclass
from typing import Literal

from common import mixing, run, schema
from common.agent import AgentFlags
from common.policies import PolicyFlags, StudentFlags

TEST_TIMEOUT = 120.0  # seconds, of the local grader
TOKENS = ("in", "cached", "out")


@dataclass(kw_only=True)
class Args(AgentFlags, StudentFlags, PolicyFlags):
    tasks: str
    """toy:train|dev|test|study (or train2|dev2|study2), swe-bench-verified, swe-bench-lite, swe-gym:train|holdout, swe-gym-lite,
    dataset:NAME:SPLIT, or a .jsonl, .json or .parquet file; each may end in :N"""
    out: str
    """the directory to write"""
    student: str | None = None
    """policy to score (any policy: `oracle` scores the teacher)"""
    predictions: str | None = None
    """grade the patches of this file instead"""
    trajectories: str | None = None
    """grade the patches of these trajectories instead"""
    grader: Literal["auto", "local", "swebench"] = "auto"
    """local runs the tests here, in the sandbox; swebench is the official harness; auto: local where a row can"""
    regrade: bool = False
    """work the results of a finished --out out again from its logs, without running anything"""
    iteration: int = 0
    """DAgger iteration of the student; recorded"""
    limit: int | None = None
    """take the first N tasks"""
    temperature: float = 0.0
    """sampling temperature; 0 is greedy"""
    top_p: float = 1.0
    """nucleus sampling"""
    teacher_key_env: str = "OPENAI_API_KEY"
    """environment variable with the key of the openai: policy that is scored, whoever that is"""
    test_timeout: float | None = None
    """seconds that the tests of one task may take (default: 120 local, 1800 swebench, which is the harness's own)"""
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

    from common import cost, docker_engine, jsonl, official, policies, prompts, sandbox, stage_tools, tasks
    from common.errors import InputError

    stage_tools.check_numbers(args)
    if sum(source is not None for source in (args.student, args.predictions, args.trajectories)) != 1:
        raise InputError("give exactly one of --student, --predictions and --trajectories")
    rows = {row["instance_id"]: row for row in tasks.load(args.tasks, args.limit)}
    graders = official.choose(list(rows.values()), args.grader)
    for name, row in rows.items():  # refuses a task that has none
        if graders[name] == "local":
            sandbox.kind_of(row, "local")
    if args.regrade:
        return regrade(args, rows, graders)
    if args.student:
        sandbox.prepare(list(rows.values()), args.sandbox, check_images=args.check_images, evict_images=args.evict_images)
    meter = cost.Meter(Path(args.out) / "trajectories.jsonl", args.price, args.max_cost)
    student = given = None
    if args.student:
        student = policies.open_policy(
            args.student, role="student", batch=args.workers,
            **args.options("student") | {"key_env": args.teacher_key_env}, temperature=args.temperature, top_p=args.top_p,
            max_new_tokens=args.max_new_tokens, max_context=args.max_context,
        )  # fmt: skip
    else:
        given = read_patches(args, rows)

    same = {
        "tasks": tasks.hash_rows(list(rows.values())),
        "grader": args.grader,
        "test_timeout": args.test_timeout or TEST_TIMEOUT,
        "iteration": args.iteration,
        **{name: run.hash_file(path) if path else None
           for name, path in (("predictions", args.predictions), ("trajectories", args.trajectories))},
    }  # fmt: skip
    if "swebench" in graders.values():
        same["swebench"] = {"version": official.version(), "test_timeout": args.test_timeout or official.TIMEOUT}
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
    stage = run.Stage(args.out, args, same, directory=True, overwrite=args.overwrite, outputs=(output, rollouts))
    if args.overwrite:
        official.forget(out / "swebench")
    if stage.done and output.finished:
        return stage.say_done()
    (out / "logs").mkdir(exist_ok=True)
    official_tasks = {name for name, grader in graders.items() if grader == "swebench"}
    if official_tasks and (student or any(patch_of(r).strip() for r in given if r["instance_id"] in official_tasks)):
        images = docker_engine.images()  # now, not after hours of rolling out
        images.evict = args.evict_images
        images.wanted |= {rows[name]["image"] for name in official_tasks}
        if args.check_images:
            images.check([rows[name]["image"] for name in rows if name in official_tasks])

    if student:
        meter.open(args.overwrite)
        if not rollouts.finished:
            roll_out(args, stage, rollouts, meter.watch(student), meter, rows)
        given = list(jsonl.read(rollouts.path, "trajectory"))
        name = args.student
        lines = [{"instance_id": r["instance_id"], "model_name_or_path": name, "model_patch": r["patch"]} for r in given]
        jsonl.write_atomically(out / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    output.open(stage.resumed)
    results, left = grade_all(args, stage, output, rows, graders, given)
    summary = measure(rows, results, infra_errors=left + (len(rows) - len(given) if student else 0))
    summary |= meter.summary()
    if student:
        summary["sandbox"] = "+".join(sorted({sandbox.kind_of(row, args.sandbox) for row in rows.values()}))
    output.finish([output.key(result) for result in results])
    jsonl.write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    stage.finish(summary)


def roll_out(args: Args, stage, rollouts, student, meter, rows: dict[str, dict]) -> None:
    """The student alone on every task, into trajectories.jsonl."""
    from common import agent, stage_tools

    rollouts.open()
    count = stage_tools.token_counter(stage, student)
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
    stage_tools.run_jobs(args, stage, rollouts, jobs, todo, collect, args.workers, "roll out", postfix, meter)
    rollouts.finish(jobs)


def grade_all(args: Args, stage, output, rows: dict, graders: dict, given: list[dict]) -> tuple[list[dict], int]:
    """Grade every patch; returns the results in order and how many the machine left undone."""
    import os
    from pathlib import Path

    from common import grading, official, stage_tools

    by_key = {(record["instance_id"], record.get("trajectory_id")): record for record in given}

    def grade(key: tuple) -> list[dict]:
        record, started = by_key[key], time.time()
        row, grader, patch, name = rows[key[0]], graders[key[0]], patch_of(record), log_name(args, key)
        if not patch.strip():
            verdict = grading.no_patch(row)
        elif grader == "swebench":
            home = Path(args.out) / "swebench" / name
            verdict = official.grade(row, patch, home, timeout=args.test_timeout or official.TIMEOUT)
        else:
            verdict = grading.grade(row, patch, timeout=args.test_timeout or TEST_TIMEOUT)
        grading.save_log(Path(args.out) / "logs" / f"{name}.txt", row, grader, patch, verdict)
        return [result(row, record, verdict, grader, time.time() - started)]

    todo = [key for key in by_key if key not in output]
    workers = min(args.workers, os.cpu_count() or 1)  # tests are work for a core, not a wait
    left = stage_tools.run_jobs(
        args, stage, output, list(by_key), todo, grade, workers, "grade", lambda r: {"resolved": r["resolved"]}
    )
    return list(output.records(list(by_key))), left


def regrade(args: Args, rows: dict[str, dict], graders: dict[str, str]) -> None:
    """The results of a finished --out again, from its logs: after a change of the rule, of swebench or its parsers.

    A log that is missing or belongs to another patch, task or grader is an InputError; nothing is written then.
    """
    from pathlib import Path

    from common import grading, jsonl, official
    from common.errors import InputError

    out = Path(args.out)
    if args.overwrite:
        raise InputError("--regrade reads the logs that --overwrite throws away: give one of them")
    given = list(jsonl.read(out / "trajectories.jsonl", "trajectory")) if args.student else read_patches(args, rows)
    by_key = {(record["instance_id"], record.get("trajectory_id")): record for record in given}
    stage = run.Stage.finished(args.out, args)
    results = []
    for old in jsonl.read(out / "results.jsonl", "result"):
        key = (old["instance_id"], old["trajectory_id"])
        if key not in by_key or key[0] not in rows:
            raise InputError(f"{out / 'results.jsonl'}: {key[1] or key[0]!r} is not among the tasks and patches given")
        row, grader, patch = rows[key[0]], graders[key[0]], patch_of(by_key[key])
        end, log = grading.read_log(out / "logs" / f"{log_name(args, key)}.txt", row, grader, patch)
        if grader == "swebench" and end != "no_patch":
            verdict = official.regrade(row, patch, end, log)
        else:
            verdict = grading.regrade(row, end, log)
        results.append(result(row, by_key[key], verdict, grader, old["seconds"]))
    summary = measure(rows, results, infra_errors=stage.manifest["summary"]["infra_errors"])
    summary |= {name: then for name, then in stage.manifest["summary"].items() if name in ("cost", "sandbox")}
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in results]
    jsonl.write_atomically(out / "results.jsonl", "".join(lines))
    jsonl.write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    stage.amend(summary)


def patch_of(record: dict) -> str:
    """The patch of a trajectory or of a prediction (where it may be null)."""
    return (record["patch"] if "patch" in record else record["model_patch"]) or ""


def log_name(args: Args, key: tuple) -> str:
    """With --trajectories a task may have several patches."""
    return key[1] if args.trajectories else key[0]


def result(row: dict, record: dict, verdict: dict, grader: str, seconds: float) -> dict:
    """One line of results.jsonl. seconds: of grading; a trajectory's own are taken where there is one."""
    from common.metrics import failure_mode

    turns = [m for m in record.get("messages", []) if m["role"] == "assistant"]
    tokens = {kind: sum(m["tokens"].get(kind) or 0 for m in turns) for kind in TOKENS}
    return {
        "schema": schema.VERSION,
        "instance_id": record["instance_id"],
        "trajectory_id": record.get("trajectory_id"),
        "resolved": verdict["resolved"],
        "tests_status": verdict["tests_status"],
        "exit_status": record.get("exit_status"),
        "failure_mode": failure_mode(row, record, patch_of(record), verdict),
        "turns": len(turns) if "messages" in record else None,
        "tokens": tokens if "messages" in record else None,
        "seconds": round(record["finished"] - record["started"] if "started" in record else seconds, 3),
        "tampered": verdict["tampered"],
        "grader": grader,
        "suspected_infra": verdict.get("suspected_infra"),
        "groups": groups_of(row),
    }


def groups_of(row: dict) -> list[str]:
    """Sets of tasks that are counted and compared apart: families of embedded bugs, else repositories."""
    if "family" in row:
        return [f"families {'not ' if row.get('unseen_family') else ''}in train", f"family {row['family']}"]
    return [f"repository {row['repo']}"] if row.get("repo") else []


def measure(rows: dict[str, dict], results: list[dict], infra_errors: int) -> dict:
    """Resolved with its interval, in all and in each group; how episodes ended and why patches failed."""
    from common.metrics import FAILURE_MODES, rate

    ends = [result["exit_status"] for result in results if result["exit_status"] is not None]
    modes = [result["failure_mode"] for result in results]

    groups: dict[str, list[bool]] = {}
    for result in results:
        for name in groups_of(rows[result["instance_id"]]):
            groups.setdefault(name, []).append(result["resolved"])
    resolved, tasks = sum(result["resolved"] for result in results), len(results) + infra_errors
    graders = sorted({result.get("grader", "local") for result in results})
    official = {}
    if "swebench" in graders:  # what SWE-bench's own tables call resolved: nothing is left out of the denominator
        suspected = sum(bool(result.get("suspected_infra")) for result in results)
        official = {"rate_of_all": resolved / tasks, "suspected_infra": suspected}
    return {
        "tasks": tasks,
        "resolved": resolved,
        **rate(resolved, len(results)),
        **official,
        "infra_errors": infra_errors,
        "grader": "+".join(graders) or None,
        "tampered": sum(result["tampered"] for result in results),
        "turns": sum(result["turns"] or 0 for result in results),
        **{f"tokens_{kind}": sum((result["tokens"] or {}).get(kind, 0) for result in results) for kind in TOKENS},
        **{f"exit_{end}": ends.count(end) for end in sorted(set(ends))},
        "failure_modes": {mode: modes.count(mode) for mode in FAILURE_MODES if mode in modes},
        "groups": {
            name: {"tasks": len(group), "resolved": sum(group), **rate(sum(group), len(group))}
            for name, group in sorted(groups.items())
            if len(groups) > 1
        },
    }


def read_patches(args: Args, rows: dict[str, dict]) -> list[dict]:
    """The records of --predictions (one a task; a task without one gets an empty patch) or --trajectories."""
    from common import jsonl, predictions
    from common.errors import InputError

    if args.predictions:
        records = predictions.read(args.predictions)
    else:
        lines = enumerate(jsonl.read(args.trajectories, "trajectory"), start=1)
        records = ((f"{args.trajectories}:{number}", record) for number, record in lines)
    given, seen = [], set()
    for where, record in records:
        name = record["instance_id"]
        key = name if args.predictions else record["trajectory_id"]
        if name not in rows:
            raise InputError(f"{where}: instance_id {name!r} is not in --tasks {args.tasks}")
        if key in seen:
            raise InputError(f"{where}: {key!r} is there twice")
        seen.add(key)
        # Whatever else a prediction has (the whole row of its task, say) is none of ours.
        given.append({"instance_id": name, "model_patch": record["model_patch"]} if args.predictions else record)
    if args.predictions:
        given += [{"instance_id": name, "model_patch": ""} for name in rows if name not in seen]
    return given


if __name__ == "__main__":
    run.main(Args, work)
