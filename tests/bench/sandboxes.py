"""What isolation costs: seconds until the first command, milliseconds a command, memory of this process.

    tests/engine.sh && .venv/bin/python tests/bench/sandboxes.py            # --idle 64 containers at once
    .venv/bin/python tests/bench/sandboxes.py --image NAME                  # of a real task

Bash, bubblewrap and Docker take turns, command by command, so that all of them meet the same machine.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import docker_images  # noqa: E402

from common.docker_sandbox import DockerSandbox  # noqa: E402
from common.sandbox import LocalSandbox  # noqa: E402

FILES = {"a.py": "A = 1\n", "b/c.py": "C = 1\n"}


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def resident() -> int:
    """Kilobytes of this process in memory."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="an image with a repository at /testbed (default: a small one is made)")
    parser.add_argument("--commands", type=int, default=40)
    parser.add_argument("--idle", type=int, default=64)
    args = parser.parse_args()
    row = {"instance_id": "bench", "base_commit": "x", "local": {"source": FILES},
           "image": args.image or docker_images.build("bench", FILES)}  # fmt: skip

    starts = {"bubblewrap": [], "docker": []}
    for _ in range(5):
        for name, kind in (("bubblewrap", LocalSandbox), ("docker", DockerSandbox)):
            box = kind(row)
            starts[name].append(timed(lambda: (box.start(), box.run("true"))))
            box.stop()

    spent = {"bash": [], "bubblewrap": [], "docker": []}
    with LocalSandbox(row) as local, DockerSandbox(row) as docker:
        for _ in range(args.commands):
            spent["bash"].append(timed(lambda: subprocess.run(["bash", "-c", "true"], capture_output=True)))
            spent["bubblewrap"].append(timed(lambda: local.run("true")))
            spent["docker"].append(timed(lambda: docker.run("true")))
        local.run("echo x >> a.py"), docker.run("echo x >> a.py")
        patch = {"bubblewrap": timed(local.diff), "docker": timed(docker.diff)}

    print("| | start and first command, s | a command, ms (median, 90th percentile) | over bash, ms | the patch, ms |")
    print("|---|---|---|---|---|")
    bare = statistics.median(spent["bash"])
    for name, times in spent.items():
        times.sort()
        print(f"| {name} | {statistics.median(starts[name]) / 1000:.2f} |" if name in starts else f"| {name} | |", end="")
        print(f" {statistics.median(times):.0f}, {times[int(0.9 * len(times))]:.0f} | {statistics.median(times) - bare:.0f} |",
              f"{patch[name]:.0f} |" if name in patch else " |")  # fmt: skip

    before = resident()
    boxes = [DockerSandbox(row) for _ in range(args.idle)]
    try:
        for box in boxes:
            box.start()
        print(f"\n{args.idle} idle containers: this process has {resident() / 1024:.0f} MB, {before / 1024:.0f} MB before")
    finally:
        for box in boxes:
            box.stop()


if __name__ == "__main__":
    main()
