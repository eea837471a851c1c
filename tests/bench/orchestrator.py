"""What the scripts themselves cost: CPU per turn, memory per live trajectory, seconds until they answer.

    python tests/bench/orchestrator.py

The server (simulated.py) holds the last answer of every trajectory until all of them wait for theirs: then all live, each
with 30,000 tokens (120,000 characters) of history. The same with one trajectory is what the script takes by itself.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine import measure, ours
from simulated import ROOT, Plan

SCRIPTS = ("01_collect.py", "02_relabel.py", "03_train.py", "04_eval.py")


def full(trajectories: int) -> Plan:
    """20 turns with answers of 80 tokens and observations of 1,500."""
    return Plan(tasks=trajectories, turns=20, tokens=80, rate=20, printed=6000, seconds=1.0, spread=0.5,
                at_once=trajectories, slots=trajectories, hold=trajectories)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=int, nargs="+", default=[64, 512])
    args = parser.parse_args()

    print("| script | `--help`, s (median of 5) |\n|---|---|")
    for script in SCRIPTS:
        spent = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([sys.executable, script, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
            spent.append(time.perf_counter() - began)
        print(f"| {script} | {statistics.median(spent):.2f} |", flush=True)

    print("\n| live trajectories | turns | to the first request, s | CPU ms a turn | peak MB | MB a trajectory |")
    print("|---|---|---|---|---|---|")
    alone = None
    for live in [1, *args.live]:
        plan = full(live)
        with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as home:
            got = measure(plan, lambda port: ours(plan, live, Path(home) / "run", port), Path(home) / "run")
        alone = alone or got
        more = max(live - 1, 1)
        print(f"| {live} | {got['turns']} | {got['start']:.1f} | {1000 * got['engine'] / got['turns']:.1f} "
              f"| {got['memory']:.0f} | {(got['memory'] - alone['memory']) / more:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
