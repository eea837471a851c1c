"""The rollout engine on a simulated server and simulated sandboxes (bench/simulated.py): hundreds of workers at once."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from common import jsonl
from test_scripts import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))

import engine  # noqa: E402
from simulated import Plan  # noqa: E402


def start_server(plan):
    environment = os.environ | {"SIMULATED": json.dumps(asdict(plan)), "OPENAI_API_KEY": "none"}
    server = subprocess.Popen([sys.executable, engine.HERE / "simulated.py", "server"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True, env=environment)  # fmt: skip
    return server, int(server.stdout.readline()), environment


def test_every_engine_is_given_the_same_work_and_the_limit_is_that_of_its_numbers():
    plan = Plan(tasks=6, turns=4, long=1, seed=3)
    assert plan.limits() == Plan(tasks=6, turns=4, long=1, seed=3).limits() != replace(plan, seed=4).limits()
    assert [plan.turns_of(task) for task in range(6)] == [12, 4, 4, 4, 4, 4]
    assert plan.answer(2, 0, "bash").endswith("\n```bash\nstep 2 0\n```")
    assert plan.answer(2, 3, "bash").endswith("\n```bash\nsubmit\n```")
    tokens = sum(plan.tokens_of(task, turn) for task in range(6) for turn in range(plan.turns_of(task)))
    assert plan.limits()["server"] == pytest.approx(tokens / plan.rate / plan.at_once)


def test_a_small_run_asks_for_every_turn_once(tmp_path):
    plan = Plan(tasks=6, turns=4, rate=1e4, seconds=0.01, slots=2)
    seen = engine.measure(plan, lambda port: engine.ours(plan, 3, tmp_path / "run", port), tmp_path / "run")
    assert (seen["turns"], seen["again"]) == (24, 0)
    records = list(jsonl.read(tmp_path / "run" / "trajectories.jsonl", "trajectory"))
    assert [record["exit_status"] for record in records] == ["submitted"] * 6


@pytest.mark.slow
def test_64_workers_keep_a_server_busy(tmp_path):
    """At most 1.05 times the limit on an idle machine (bench/README.md); the bound here is for a busy one."""
    plan = Plan(tasks=128, turns=6, rate=256, at_once=8, spread=0.5, slots=32)
    seen = engine.measure(plan, lambda port: engine.ours(plan, 64, tmp_path / "run", port), tmp_path / "run")
    assert (seen["turns"], seen["again"]) == (6 * 128, 0)
    assert seen["wall"] < 1.5 * max(plan.limits().values())


@pytest.mark.slow
def test_512_workers_stop_at_once_and_the_same_command_goes_on(tmp_path):
    """Interrupted while they wait for answers and for commands of a minute."""
    out = tmp_path / "trajectories.jsonl"
    slow = Plan(tasks=600, turns=2, even=False, rate=200, at_once=64, seconds=60.0, spread=0.1, slots=300)
    server, port, environment = start_server(slow)
    with server, subprocess.Popen(engine.ours(slow, 512, tmp_path, port), cwd=tmp_path, env=environment,
                                  stderr=subprocess.PIPE, text=True) as script:  # fmt: skip
        part, until = tmp_path / "trajectories.jsonl.part", time.monotonic() + 60
        while not part.exists() or len(part.read_bytes().splitlines()) < 100:
            assert script.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        asked = time.monotonic()
        script.send_signal(signal.SIGINT)
        _, said = script.communicate()
        assert time.monotonic() - asked < 5 and script.returncode == 1
        assert "the same command goes on" in said
    before = {record["trajectory_id"]: record["started"] for record in jsonl.read(part)}

    fast = replace(slow, rate=1e5, seconds=0.01)
    server, port, environment = start_server(fast)
    with server:
        subprocess.run(engine.ours(fast, 512, tmp_path, port), cwd=tmp_path, env=environment, check=True)
    after = {record["trajectory_id"]: record["started"] for record in jsonl.read(out, "trajectory")}
    assert len(after) == 600 and after == after | before
