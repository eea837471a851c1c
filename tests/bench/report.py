"""How long the report of a large run takes to write and to open, and how much memory.

    .venv/bin/python tests/bench/report.py                         2,000 trajectories of 50 turns
    .venv/bin/python tests/bench/report.py --trajectories 200 --turns 10

Makes a run of one iteration by seed: observations of about 600 tokens (pieces of a file that is made for the episode,
so what is printed again packs well), labels of which a third differ, and writes its page in a process of its own. Then
headless Chromium, where there is one, opens the page: until the first list is drawn, and until a trajectory that was
asked for can be read.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

POLICY = {"model": "hf:model", "adapter": None, "adapter_hash": None, "quantisation": "none",
          "sampling": {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 256}, "extra": {}}  # fmt: skip


def vocabulary(chance: random.Random) -> list[str]:
    parts = [
        "get",
        "set",
        "parse",
        "value",
        "node",
        "field",
        "model",
        "query",
        "path",
        "cache",
        "index",
        "name",
        "test",
    ]
    words = [
        "self",
        "return",
        "def",
        "if",
        "not",
        "None",
        "in",
        "for",
        "import",
        "assert",
        "(",
        ")",
        ":",
        "=",
        ".",
        ",",
        "[",
        "]",
    ]
    return words * 6 + ["_".join(chance.sample(parts, chance.randint(1, 3))) for _ in range(3000)]


def source(chance: random.Random, words: list[str]) -> list[str]:
    """A file of 400 lines."""
    return [
        f"{number:>4}  {' ' * 4 * chance.randint(0, 3)}{' '.join(chance.choices(words, k=7))}" for number in range(400)
    ]


def observation(chance: random.Random, lines: list[str]) -> str:
    """About 600 tokens (2.4 kB): a piece of the file that this episode is about."""
    first = chance.randrange(len(lines) - 60)
    return "exit 0\n" + "\n".join(lines[first : first + 60])[:2400]


def action(chance: random.Random, words: list[str]) -> tuple[str, str]:
    command = f"sed -n '{chance.randint(1, 400)},{chance.randint(401, 900)}p' src/{chance.choice(words)}.py"
    return f"{' '.join(chance.choices(words, k=30))}.\n```bash\n{command}\n```", command


def trajectory(chance: random.Random, words: list[str], number: int, turns: int) -> tuple[dict, list[dict]]:
    name = f"made__up-{number:05d}"
    head = {"schema": 1, "trajectory_id": f"{name}.i1.a0", "instance_id": name, "iteration": 1}
    issue = f"Issue {number}. " + " ".join(chance.choices(words, k=250))
    messages = [{"role": "system", "content": "You repair software."}, {"role": "user", "content": issue}]
    labels, lines = [], source(chance, words)
    tokens = {"in": 900, "cached": 800, "out": 60}
    for turn in range(turns):
        actor = chance.choice(["student", "teacher"])
        text, command = action(chance, words)
        said = {"role": "assistant", "content": text, "turn": turn, "actor": actor, "command": command, "logprob": -0.2}
        messages.append(said | {"finish_reason": "stop", "tokens": tokens, "seconds": 1.5})
        seen = {"role": "user", "content": observation(chance, lines)}
        messages.append(seen | {"exit_code": 0, "seconds": 0.1, "truncated": False})
        agrees = None if actor == "teacher" else chance.random() < 2 / 3
        label = {"turn": turn, "label": action(chance, words)[0] if agrees is False else text, "agrees": agrees}
        label |= {"valid": True, "reason": None, "source": "executed" if actor == "teacher" else "queried"}
        labels.append(head | label | {"teacher": POLICY, "tokens": tokens, "seconds": 1.0})
    record = {"base_commit": f"{number:040x}", "attempt": 0, "seed": 0, "mix": "turn", "beta": 0.5, "student": POLICY}
    record |= {"teacher": POLICY, "prompt": "swe-1", "limits": {}, "messages": messages, "exit_status": "submitted"}
    return head | record | {"patch": "", "started": 0, "finished": 90}, labels


def make_run(home: Path, trajectories: int, turns: int) -> int:
    """Write the run; returns the bytes of its trajectories and labels."""
    chance = random.Random(0)
    words = vocabulary(chance)
    place = home / "iter_001"
    place.mkdir(parents=True)
    with open(place / "trajectories.jsonl", "w") as rolled, open(place / "labels.jsonl", "w") as labelled:
        for number in range(trajectories):
            record, labels = trajectory(chance, words, number, turns)
            rolled.write(json.dumps(record) + "\n")
            labelled.writelines(json.dumps(label) + "\n" for label in labels)
    settings = {
        "mix": "turn",
        "schedule": "linear:2",
        "beta": None,
        "teacher": "hf:teacher",
        "student": "hf:model",
        "seed": 0,
    }
    base = {"finished": 1.0, "seconds": 60.0, "settings": settings, "same": {}}
    shares = {"beta": 0.5, "teacher_turn_share": 0.5, "teacher_token_share": 0.5}
    collect = {"trajectories": trajectories, "turns": trajectories * turns} | shares
    for name, summary in (("trajectories", collect), ("labels", {"agree": 0.67, "states": trajectories * turns})):
        (place / f"{name}.jsonl.manifest.json").write_text(json.dumps(base | {"summary": summary}))
    return sum((place / f"{name}.jsonl").stat().st_size for name in ("trajectories", "labels"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--keep", help="write the page here instead of a temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        size = make_run(Path(scratch, "run"), args.trajectories, args.turns)
        page = Path(args.keep or Path(scratch, "report.html")).resolve()
        began = time.time()
        subprocess.run([sys.executable, "-m", "common.report", Path(scratch, "run"), "--out", page], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        seconds, used = time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        opened = open_in_browser(page)
        heads = "trajectories, turns, data MB, page MB, write s, CPU s, peak MB, open s, trajectory s, heap MB".split(
            ", "
        )
        cells = [args.trajectories, args.turns, f"{size / 1e6:.0f}", f"{page.stat().st_size / 1e6:.0f}"]
        cells += [f"{seconds:.1f}", f"{used.ru_utime + used.ru_stime:.1f}", f"{used.ru_maxrss / 1024:.0f}", *opened]
        for line in (heads, ["---"] * len(heads), cells):
            print(f"| {' | '.join(map(str, line))} |")


def open_in_browser(page: Path) -> list[str]:
    """Seconds until the first list is drawn, until a trajectory can be read; memory of its JavaScript."""
    import browser

    if browser.missing():
        return ["-"] * 3
    with browser.open() as opened:
        began = time.time()
        opened.go(page.as_uri() + "#trajectories")
        opened.wait("document.querySelectorAll('.row').length > 5", 120)
        listed = time.time() - began
        took = opened.run(
            "const began = performance.now();"
            "return openTrajectory(trajectories.length >> 1, 0).then(() => performance.now() - began)"
        )
        assert opened.run("return document.querySelectorAll('.turn').length") > 0
        used = opened.run("return performance.memory.usedJSHeapSize")
    return [f"{listed:.1f}", f"{took / 1000:.2f}", f"{used / 1e6:.0f}"]


if __name__ == "__main__":
    main()
