"""The scripts with tasks that run in containers: killed, without an engine for a while, and the whole loop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import docker_images
import pytest
import tiny
from test_loop import loop
from test_scripts import script, summary, timeless

pytestmark = [pytest.mark.docker, pytest.mark.slow]
ROOT = Path(__file__).resolve().parent.parent
PID = Path("/var/run/docker.pid")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Six toy tasks, each with an image of its own."""
    if docker_images.why_not():
        pytest.skip(docker_images.why_not())
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in docker_images.toy_rows("toy:dev:6")))
    return path


def demonstrate(tasks, out, *more, **options):
    """The oracle's trajectories."""
    return script("01_collect.py", "--tasks", tasks, "--teacher", "oracle", "--mix", "teacher", "--workers", 2,
                  "--out", out, *more, **options)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "t.jsonl"
    demonstrate(tasks, out)
    return out


def ours() -> list:
    import docker

    return docker.from_env().containers.list(all=True, filters={"label": "swe-dagger"})


def comparable(path):
    return [{k: v for k, v in record.items() if k != "messages"}
            | {"messages": [{k: v for k, v in m.items() if k != "content" or "s in" not in v} for m in record["messages"]]}
            for record in timeless(path)]  # fmt: skip


def test_the_same_tasks_end_the_same_way_in_both_sandboxes(undisturbed, tmp_path):
    script("01_collect.py", "--tasks", "toy:dev:6", "--teacher", "oracle", "--mix", "teacher", "--out", tmp_path / "t.jsonl")
    both = [[(r["instance_id"], r["exit_status"], r["patch"]) for r in map(json.loads, path.read_text().splitlines())]
            for path in (undisturbed, tmp_path / "t.jsonl")]
    assert both[0] == both[1] and all(end == "submitted" and patch for _, end, patch in both[0])


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_and_started_again(tasks, undisturbed, tmp_path, sign):
    """Killed, containers stay until the next start; asked to stop, they go at once. The file comes out the same."""
    out = tmp_path / "t.jsonl"
    argv = [sys.executable, ROOT / "01_collect.py", "--tasks", tasks, "--teacher", "oracle", "--mix", "teacher",
            "--workers", "2", "--out", out]
    running = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part = Path(f"{out}.part")
    while not (part.exists() and part.read_text().count("\n") >= 2 and ours()):
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.02)
    running.send_signal(sign)
    running.wait(60)
    assert bool(ours()) == (sign == signal.SIGKILL)
    done = demonstrate(tasks, out)
    assert "dropped" not in done.stderr or sign == signal.SIGKILL
    assert ours() == []
    assert comparable(out) == comparable(undisturbed)


def test_a_missing_image_is_its_tasks_own_trouble(tasks, tmp_path):
    rows = [json.loads(line) for line in tasks.read_text().splitlines()][:3]
    rows[1]["image"] = "127.0.0.1:9/none:latest"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = demonstrate(tmp_path / "rows.jsonl", tmp_path / "t.jsonl", "--check-images", "--max-infra", 0.5, "--infra-retries", 0)
    assert summary(done)["infra_errors"] == "1" and summary(done)["trajectories"] == "2"
    assert done.stderr.index("missing image 127.0.0.1:9/none:latest") < done.stderr.index("collect:")
    infra = [json.loads(line) for line in (tmp_path / "t.jsonl.infra.jsonl").read_text().splitlines()]
    assert [record["instance_id"] for record in infra] == [rows[1]["instance_id"]]


@pytest.mark.skipif("os.geteuid() != 0 or not PID.exists()", reason="needs a dockerd that it may stop (tests/engine.sh)")
def test_the_engine_stops_and_comes_back(tasks, undisturbed, tmp_path):
    """Whatever of the work that hits, the run goes on or the same command repeats it, to the same file."""
    out = tmp_path / "t.jsonl"
    argv = [sys.executable, ROOT / "01_collect.py", "--tasks", tasks, "--teacher", "oracle", "--mix", "teacher",
            "--workers", "2", "--infra-retries", "3", "--out", out]
    running = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = Path(f"{out}.part")
    while not (part.exists() and part.read_text().count("\n") >= 2):
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.02)
    pid = int(PID.read_text())
    os.kill(pid, signal.SIGTERM)
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
        time.sleep(0.1)
    subprocess.run([ROOT / "tests/engine.sh"], check=True, timeout=120)
    _, errors = running.communicate(timeout=300)
    assert running.returncode in (0, 1), errors
    if running.returncode:
        assert "failures of the machine in a row" in errors or "could not be run" in errors
        demonstrate(tasks, out)
    assert Path(f"{out}.infra.jsonl").exists()
    assert comparable(out) == comparable(undisturbed)
    demonstrate(tasks, tmp_path / "more.jsonl", "--limit", 1)  # what the dead engine could not remove goes now
    assert ours() == []
