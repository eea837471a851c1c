"""Trajectories and labels made by hand, for tests of what is made of them."""

import json
import random

from common import jsonl, training_data


def trajectory(name="toy-1", attempt=0, turns=3, seed=0, kwargs=None, think=False):
    rng = random.Random(seed)
    words = ["total", "price", "cart", "items", "queue"]
    messages = [{"role": "system", "content": "Fix the bug."}, {"role": "user", "content": f"{name}: wrong total"}]
    for turn in range(turns):
        thought = f"<think>\n{rng.choice(words)}\n</think>\n\n" if think else ""
        said = f"{thought}Look at {rng.choice(words)}.\n```bash\ncat {rng.choice(words)}.py\n```"
        actor = rng.choice(["student", "teacher"])
        messages.append({"role": "assistant", "content": said, "turn": turn, "actor": actor, "command": "cat x",
                         "finish_reason": "stop", "tokens": {}, "seconds": 0.1, "logprob": None})
        messages.append({"role": "user", "content": f"exit 0\n{rng.choice(words)} = {rng.random():.3f}", "exit_code": 0})
    extra = {"chat_template_kwargs": kwargs} if kwargs else {}
    return {"schema": 1, "trajectory_id": f"{name}.i1.a{attempt}", "instance_id": name, "base_commit": "c", "iteration": 1,
            "attempt": attempt, "seed": 0, "mix": "turn", "beta": 0.5, "student": {"extra": extra}, "teacher": {},
            "prompt": "toy-1", "limits": {}, "messages": messages, "exit_status": "turn_limit", "patch": "",
            "started": 0, "finished": 1}  # fmt: skip


def label(of, turn, text=None, valid=True):
    """The teacher's label: what was executed where the teacher acted, something else where the student did."""
    said = [m for m in of["messages"] if m["role"] == "assistant"][turn] if text is None else None
    if said is not None:
        text = said["content"] if said["actor"] == "teacher" else f"Better.\n```bash\nls {turn}\n```"
    return {"schema": 1, "trajectory_id": of["trajectory_id"], "instance_id": of["instance_id"], "iteration": 1,
            "turn": turn, "label": text, "valid": valid, "reason": None if valid else "no command", "source": "queried",
            "teacher": {}, "tokens": {}, "seconds": 0.1, "agrees": None}  # fmt: skip


def write(directory, trajectories, labels):
    directory.mkdir(parents=True, exist_ok=True)
    for name, records in (("trajectories", trajectories), ("labels", labels)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(directory)


def tokenised(directories, tokenizer, max_context=4096):
    """(the samples of each trajectory, labels left out) as 03_train prepares them."""
    labels, kwargs = training_data.read_labels(directories)
    made = [training_data.tokenise(record, of[record["trajectory_id"]], tokenizer, kwargs, max_context)
            for directory, of in zip(directories, labels)
            for record in jsonl.read(f"{directory}/trajectories.jsonl") if record["trajectory_id"] in of]
    return [trajectory.samples() for trajectory, _ in made], sum(too_long for _, too_long in made)


def iteration(directory, n=6, turns=3, **options):
    trajectories = [trajectory(f"toy-{i // 2}", i % 2, turns, seed=i, **options) for i in range(n)]
    return write(directory, trajectories, [label(t, turn) for t in trajectories for turn in range(turns)])
