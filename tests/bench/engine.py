"""How close the rollout engine comes to the fastest that any could be, and mini-swe-agent's batch runner beside it.

    python tests/bench/engine.py                                       half an hour; makes a virtual environment for the peer
    python tests/bench/engine.py --workers 64 --case server --no-peer

Server and environments are simulated (simulated.py), 01_collect.py and `mini-extra swebench` are the real ones. Limit: the
longest trajectory by itself, all decoding at the server's rate, or all commands over the slots, whichever is most. Wall
clock is from the server's first request to the end of the process. Two cases:

* server: twice as many trajectories as workers and eight workers for every place of the server, which has to stay busy.
* long: every eighth worker begins with a trajectory three times as long as the others, of which each of the other
  workers then does two and more; the server has room for all. What the longest one waits for is lost.

The engines use one core each and the server another: where one of them has used about as much CPU time as the wall clock
shows, it was that core which set the pace.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

from simulated import Plan

HERE = Path(__file__).resolve().parent
PEER = "mini-swe-agent==2.4.6"
CASES = {
    "server": lambda workers: Plan(
        tasks=2 * workers, turns=8, tokens=80, rate=128, at_once=max(1, workers // 8), spread=0.5, slots=workers // 2),
    "long": lambda workers: Plan(
        tasks=2 * workers, turns=6, even=False, long=workers // 8, tokens=100, rate=32, at_once=workers, printed=6000,
        slots=workers),
}  # fmt: skip
CONFIG = """
agent: {system_template: You repair a repository., instance_template: "{{task}}", step_limit: 0, cost_limit: 0}
environment: {environment_class: simulated.Environment}
model:
  model_class: litellm_textbased
  model_name: openai/mswea_bash_command
  model_kwargs: {api_base: "http://127.0.0.1:PORT/v1", api_key: none}
  cost_tracking: ignore_errors
  observation_template: "exit {{output.returncode}}\\n{{output.output}}"
"""


def write_tasks(plan: Plan, path: Path) -> None:
    with open(path, "w") as stream:
        for task in range(plan.tasks):
            row = {"instance_id": f"task-{task}", "repo": "simulated", "base_commit": f"{task}", "patch": "",
                   "problem_statement": f"Repair task number {task} of {plan.tasks}.", "test_patch": "",
                   "FAIL_TO_PASS": [], "PASS_TO_PASS": [], "version": "1", "local": {"source": {}}}  # fmt: skip
            stream.write(json.dumps(row) + "\n")


def ours(plan: Plan, workers: int, home: Path, port: int) -> list[str]:
    write_tasks(plan, home / "tasks.jsonl")
    return [sys.executable, str(HERE / "simulated.py"), "run", "01_collect.py", "--tasks", str(home / "tasks.jsonl"),
            "--teacher", f"openai:bash@http://127.0.0.1:{port}/v1", "--mix", "teacher", "--max-turns", "1000",
            "--max-context", "1000000000", "--max-tokens", "1000000000", "--max-new-tokens", "4096",
            "--time-limit", "1e9", "--workers", str(workers), "--slots", str(plan.slots), "--seed", "0",
            "--out", str(home / "trajectories.jsonl")]  # fmt: skip


def theirs(plan: Plan, workers: int, home: Path, port: int, python: Path) -> list[str]:
    (home / "data").mkdir()
    write_tasks(plan, home / "data" / "train.jsonl")
    (home / "config.yaml").write_text(CONFIG.replace("PORT", str(port)))
    return [str(python.parent / "mini-extra"), "swebench", "--subset", str(home / "data"), "--split", "train",
            "--workers", str(workers), "--config", str(home / "config.yaml"), "--output", str(home / "out")]  # fmt: skip


def measure(plan: Plan, command, home: Path) -> dict:
    """Run one engine against a server of its own. command(port) -> argv. Raises RuntimeError if it fails, or is not done
    after five times the limit."""
    patience = 60 + 5 * max(plan.limits().values())
    home.mkdir()
    environment = os.environ | {
        "SIMULATED": json.dumps(asdict(plan)), "PYTHONPATH": str(HERE), "MSWEA_SILENT_STARTUP": "1",
        "MSWEA_GLOBAL_CONFIG_DIR": str(home / "mini"), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "none",
    }  # fmt: skip
    with subprocess.Popen([sys.executable, HERE / "simulated.py", "server"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True, env=environment) as server:  # fmt: skip
        argv = command(int(server.stdout.readline()))
        with open(home / "log", "w") as log:
            began = time.monotonic()
            client = subprocess.Popen(argv, stdout=log, stderr=log, cwd=home, env=environment)
            killer = threading.Timer(patience, client.kill)
            killer.start()
            _, status, usage = os.wait4(client.pid, 0)
            ended = time.monotonic()
            killer.cancel()
        seen = json.loads(server.communicate()[0] or '{"first": null, "turns": 0}')  # nothing: it was killed
    if status or not seen["first"]:
        print(f"{' '.join(argv)}:\n" + (home / "log").read_text()[-3000:], file=sys.stderr)
        raise RuntimeError(f"{'killed' if status == 9 else 'ended'} after {ended - began:.0f} s and {seen['turns']} turns")
    return seen | {"wall": ended - seen["first"], "start": seen["first"] - began, "engine": usage.ru_utime + usage.ru_stime,
                   "memory": usage.ru_maxrss / 1024}  # fmt: skip


def peer(folder: Path) -> Path:
    """The interpreter of a virtual environment with mini-swe-agent, made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "bin" / "mini-extra").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", PEER], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peer", type=Path, default=Path(tempfile.gettempdir()) / "mini-swe-agent-venv",
                        help="where its virtual environment is or is made")
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    engines = {"ours": ours}
    if not args.no_peer:
        python = peer(args.peer)
        engines["mini-swe-agent"] = lambda *what: theirs(*what, python)
    print("| case | workers | trajectories | turns | engine | limit s | wall s | wall : limit | to ours | engine CPU s, ms a "
          "turn | server CPU s, latest ms | start s | peak MB |")  # fmt: skip
    print("|" + "---|" * 13, flush=True)
    for case in args.case:
        for workers in args.workers:
            plan, walls = CASES[case](workers), []
            limit, turns = max(plan.limits().values()), sum(map(plan.turns_of, range(plan.tasks)))
            for name, engine in engines.items():
                home = Path(tempfile.mkdtemp(prefix="engine-bench-"))
                try:
                    got = measure(plan, lambda port: engine(plan, workers, home / "run", port), home / "run")
                except RuntimeError as error:
                    print(f"| {case} | {workers} | {plan.tasks} | {turns} | {name} | {limit:.1f} | {error} |" + " |" * 6,
                          flush=True)  # fmt: skip
                    continue
                finally:
                    shutil.rmtree(home)
                walls.append(got["wall"])
                note = "" if (got["turns"], got["again"]) == (turns, 0) else f" (asked {got['turns']} + {got['again']} again)"
                print(f"| {case} | {workers} | {plan.tasks} | {turns}{note} | {name} | {limit:.1f} | {got['wall']:.1f} "
                      f"| {got['wall'] / limit:.3f} | {got['wall'] / walls[0]:.2f} "
                      f"| {got['engine']:.1f}, {1000 * got['engine'] / turns:.1f} | {got['cpu']:.1f}, "
                      f"{1000 * got['late']:.0f} | {got['start']:.1f} | {got['memory']:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
