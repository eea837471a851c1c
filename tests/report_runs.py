"""Runs made by hand, for the tests of the report: what a run's files hold, as small as may be."""

import base64
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

from common import metrics


ROOT = Path(__file__).resolve().parent.parent
HOSTILE = (
    "exit 0\n</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>\n\x1b[31mred\u202e{{chunks}}"
)
POLICY = {"model": "hf:m", "adapter": "a/iter_001/adapter", "sampling": {"temperature": 0.7, "top_p": 0.9}}


def say(command, thought="Look."):
    return f"{thought}\n```bash\n{command}\n```"


def trajectory(name, iteration=1, turns=(("student", "ls", "exit 0"),), issue="It breaks.", **changes):
    """turns: (actor, command, observation)."""
    messages = [{"role": "system", "content": "You repair."}, {"role": "user", "content": issue}]
    for number, (actor, command, observation) in enumerate(turns):
        messages.append(
            {
                "role": "assistant",
                "content": say(command),
                "turn": number,
                "actor": actor,
                "command": command,
                "finish_reason": "stop",
                "tokens": {"in": 9, "cached": 0, "out": 7},
                "seconds": 0.5,
                "logprob": -0.25,
            }
        )
        if observation is not None:
            messages.append(
                {"role": "user", "content": observation, "exit_code": 0, "seconds": 0.1, "truncated": False}
            )
    return {"schema": 1, "trajectory_id": f"{name}.i{iteration}.a0", "instance_id": name, "base_commit": "c",
            "iteration": iteration, "attempt": 0, "seed": 0, "mix": "turn", "beta": 0.5, "student": POLICY,
            "teacher": POLICY, "prompt": "toy-1", "limits": {}, "messages": messages, "exit_status": "submitted",
            "patch": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n", "started": 1.0, "finished": 5.0} | changes  # fmt: skip


def label(of, turn, text, agrees, source="queried"):
    names = {name: of[name] for name in ("schema", "trajectory_id", "instance_id", "iteration")}
    return names | {"turn": turn, "label": text, "valid": True, "reason": None, "source": source, "teacher": POLICY,
                    "tokens": {"in": 9, "cached": 0, "out": 7}, "seconds": 0.1, "agrees": agrees}  # fmt: skip


def result(of, resolved, mode=None):
    tests = {
        "FAIL_TO_PASS": {"success": [], "failure": [] if resolved else ["t.py::test_<b>"]},
        "PASS_TO_PASS": {"success": ["t.py::a"], "failure": []},
    }
    return {"schema": 1, "instance_id": of["instance_id"], "trajectory_id": of["trajectory_id"], "resolved": resolved,
            "tests_status": tests, "exit_status": "submitted", "failure_mode": mode, "turns": 1, "tokens": None,
            "seconds": 1.0, "tampered": False, "groups": [f"repository {of['instance_id'][-1]}"]}  # fmt: skip


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def finish(path, summary, settings=None, same=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": 0,
        "mix": "turn",
        "schedule": "linear:2",
        "student": "hf:m",
        "teacher": "oracle",
        "tasks": "toy:dev",
    } | (settings or {})
    path.write_text(
        json.dumps({"finished": 1.0, "seconds": 60.0, "settings": settings, "same": same or {}, "summary": summary})
    )


def evaluate(directory, trajectories, resolved, seed=0, mode="tests_failed", tasks="toy:dev", contents="h"):
    """A finished evaluation in which the first `resolved` of the tasks are."""
    results = [result(t, place < resolved, None if place < resolved else mode) for place, t in enumerate(trajectories)]
    write(directory / "trajectories.jsonl", trajectories)
    write(directory / "results.jsonl", results)
    scores = {
        "tasks": len(results),
        "resolved": resolved,
        **metrics.rate(resolved, len(results)),
        "infra_errors": 0,
        "tokens_in": 10,
        "tokens_cached": 0,
        "tokens_out": 10,
        "failure_modes": {mode: len(results) - resolved} if resolved < len(results) else {},
        "groups": {},
    }
    finish(directory / "manifest.json", scores, {"tasks": tasks, "seed": seed}, {"tasks": contents, "grader": "auto"})


def collect(directory, trajectories, labels, seed=0, **settings):
    """A collected, labelled and trained iteration."""
    write(directory / "trajectories.jsonl", trajectories)
    shares = {"beta": 0.5, "teacher_turn_share": 0.5, "teacher_token_share": 0.4}
    teacher = {"teacher_tokens_in": 100, "teacher_tokens_cached": 0, "teacher_tokens_out": 10}
    student = {"student_tokens_in": 200, "student_tokens_cached": 0, "student_tokens_out": 20}
    finish(directory / "trajectories.jsonl.manifest.json", shares | teacher | student, {"seed": seed} | settings)
    write(directory / "labels.jsonl", labels)
    finish(
        directory / "labels.jsonl.manifest.json",
        {"agree": 0.5, "states": len(labels), "tokens_in": 50, "tokens_cached": 0, "tokens_out": 5},
        {"seed": seed},
    )
    finish(
        directory / "adapter/manifest.json",
        {"labels": len(labels), "loss": 0.25},
        {"seed": seed, "data": ["x"], "init_adapter": None},
    )


def small_run(home, seed=0, resolved=(0, 1, 3), **settings):
    """Untrained, one iteration, and another; four tasks; the chosen student tested."""
    for number, count in enumerate(resolved):
        if number:
            one = trajectory("task-a", number, [("student", "ls", "exit 0"), ("teacher", "submit", None)])
            labels = [label(one, 0, say("cat x"), False), label(one, 1, say("submit"), None, "executed")]
            collect(home / f"iter_{number:03d}", [one], labels, seed, **settings)
        evaluate(
            home / f"iter_{number:03d}/eval", [trajectory(f"dev-{place}", number) for place in range(4)], count, seed
        )
    best = max(range(len(resolved)), key=lambda number: (resolved[number], -number))
    evaluate(
        home / f"test/iter_{best:03d}",
        [trajectory(f"test-{place}", best) for place in range(4)],
        2,
        seed,
        tasks="toy:test",
    )
    return home


def contents(page):
    """The data of a page, and all its chunks."""
    text = Path(page).read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    packed = re.findall(r'<script type="application/octet-stream" id="chunk-\d+">(.*?)</script>', text)
    return data, [json.loads(gzip.decompress(base64.b64decode(chunk))) for chunk in packed]


def rows(data):
    return [dict(zip(data["fields"], row)) for row in data["rows"]]


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "common.report", *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )
