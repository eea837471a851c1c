"""What 03_train.py does before the first step, on synthetic long trajectories: seconds and host memory on one core.

    .venv/bin/python tests/bench/prepare.py                                 512 trajectories, 50 turns, 30,000 tokens
    .venv/bin/python tests/bench/prepare.py --trajectories 10000 --ids      10,000 of them, as token ids (no text is made)

`tokenise` reads both files, renders and tokenises every state, and keeps it; `pack` lays out every optimiser step of one
epoch on the prefix tree. With --ids only the memory of what is kept is measured.
"""

import argparse
import importlib
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import models, prefix_tree, training_data  # noqa: E402

train = importlib.import_module("03_train")
WORDS = "def return self value index error test module import path name result list assert None True for in if not".split()


def text(tokens: int, rng: random.Random) -> str:
    """About so many tokens of something like code."""
    return " ".join(f"{rng.choice(WORDS)}_{rng.randrange(100)}\n" for _ in range(tokens // 5))


def records(number: int, turns: int, tokens: int) -> tuple[dict, list[dict]]:
    """One trajectory and its labels; every second one is what was executed."""
    rng = random.Random(number)
    name, per_turn = f"task-{number}", tokens // turns
    messages = [{"role": "system", "content": "Fix the bug."}, {"role": "user", "content": text(per_turn, rng)}]
    labels = []
    for turn in range(turns):
        said = f"{text(60, rng)}\n```bash\n{text(20, rng)}\n```"
        actor = "teacher" if turn % 2 else "student"
        messages.append({"role": "assistant", "content": said, "turn": turn, "actor": actor, "command": "x",
                         "finish_reason": "stop", "tokens": {}, "seconds": 0.1, "logprob": None})
        messages.append({"role": "user", "content": text(per_turn - 80, rng), "exit_code": 0})
        labels.append({"schema": 1, "trajectory_id": f"{name}.i1.a0", "instance_id": name, "iteration": 1, "turn": turn,
                       "label": said if actor == "teacher" else text(80, rng), "valid": True, "reason": None,
                       "source": "queried", "teacher": {}, "tokens": {}, "seconds": 0.1, "agrees": None})
    trajectory = {"schema": 1, "trajectory_id": f"{name}.i1.a0", "instance_id": name, "base_commit": "c", "iteration": 1,
                  "attempt": 0, "seed": 0, "mix": "turn", "beta": 0.5, "student": {"extra": {}}, "teacher": {},
                  "prompt": "toy-1", "limits": {}, "messages": messages, "exit_status": "turn_limit", "patch": "",
                  "started": 0, "finished": 1}
    return trajectory, labels


def as_ids(number: int, turns: int, tokens: int) -> prefix_tree.Trajectory:
    """The same shape in random token ids."""
    rng = np.random.default_rng(number)
    ids, label, per_turn = rng.integers(0, 50000, tokens).astype(np.int32), 80, tokens // turns
    made = prefix_tree.Trajectory(f"task-{number}")
    for turn in range(turns):
        state = ids[: (turn + 1) * per_turn - label]
        answer = ids[len(state) : len(state) + label] if turn % 2 else rng.integers(0, 50000, label).astype(np.int32)
        made.add(turn, np.concatenate([state, answer]), len(state))
    return made.close()


def memory_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=512)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=30000, help="of one trajectory")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer")
    parser.add_argument("--ids", action="store_true", help="random ids instead of text: memory alone")
    args = parser.parse_args()
    models.load_tokenizer(args.model)
    import torch  # noqa: F401  so that the memory at the start is that of the program

    at_start = memory_mb()
    if args.ids:
        data = [as_ids(number, args.turns, args.tokens) for number in range(args.trajectories)]
        print(f"{len(data)} trajectories of {args.turns} turns and {args.tokens} tokens: "
              f"{memory_mb()} MB at the peak, {at_start} MB before")
        return
    with tempfile.TemporaryDirectory() as home:
        with open(f"{home}/trajectories.jsonl", "w") as one, open(f"{home}/labels.jsonl", "w") as other:
            for number in range(args.trajectories):
                trajectory, labels = records(number, args.turns, args.tokens)
                one.write(json.dumps(trajectory) + "\n")
                other.writelines(json.dumps(label) + "\n" for label in labels)
        settings = train.Args(data=[home], out="", model=args.model, max_context=1 << 20, tokens_per_batch=1 << 20)
        began = time.perf_counter()
        data, _ = training_data.prepare([home], "all", args.model, 1 << 20, say=True)
        tokenised = time.perf_counter()
        rows = distinct = 0
        for _, chosen in train.plan(len(data), settings.batch_size, 1, None, 0):
            samples = [sample for i in chosen for sample in data[i].samples.samples()]
            rows += sum(batch.n_rows for batch in train.pack(settings, samples, 0.0, 1))
            distinct += sum(prefix_tree.distinct_tokens(data[i].samples.samples()) for i in chosen)
        packed = time.perf_counter()
    each = sum(sum(one.samples.length) for one in data)
    print("| trajectories | turns | tokens each | tokenise s | pack s | peak MB (start) | per-turn : distinct | computed : distinct |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| {len(data)} | {args.turns} | {distinct // len(data)} | {tokenised - began:.0f} | {packed - tokenised:.0f} "
          f"| {memory_mb()} ({at_start}) | {each / distinct:.1f} | {rows / distinct:.3f} |")


if __name__ == "__main__":
    main()
