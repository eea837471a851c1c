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

from common import tasks as task_rows

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

    return docker.from_env().containers.list(all=True, filters={"label": "swe-dagger"}, ignore_removed=True)


def differences(one, other) -> list[str]:
    """In what the records of two files differ, but for times, in words."""
    found = []
    for mine, its in zip(timeless(one), timeless(other), strict=True):
        turns = zip(mine.pop("messages"), its.pop("messages"), strict=True)
        for where, a, b in [("record", mine, its), *((f"message {n}", a, b) for n, (a, b) in enumerate(turns))]:
            found += [f"{mine['instance_id']} {where} {key}: {a.get(key)!r:.300} {b.get(key)!r:.300}"
                      for key in a.keys() | b.keys() if a.get(key) != b.get(key)]  # fmt: skip
    return found


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
    assert not differences(out, undisturbed)


def test_a_container_in_the_making_goes_too(tasks):
    """A gate failed on this: at Ctrl-C another thread had asked the engine for a container and not heard of it yet."""
    program = f"""if True:
        import json, os, sys, threading, time
        sys.path.insert(0, {str(ROOT)!r})
        from docker.models.containers import ContainerCollection
        from common import docker_engine, docker_sandbox
        create, asked = ContainerCollection.create, threading.Event()
        def slowly(self, *args, **options):
            made = create(self, *args, **options)
            asked.set()
            time.sleep(1)
            return made
        ContainerCollection.create = slowly
        row = json.loads(open({str(tasks)!r}).readline())
        threading.Thread(target=docker_sandbox.DockerSandbox(row).start, daemon=True).start()
        asked.wait(60)
        docker_engine.remove_all()
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert ours() == []


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
    assert not differences(out, undisturbed)
    demonstrate(tasks, tmp_path / "more.jsonl", "--limit", 1)  # what the dead engine could not remove goes now
    assert ours() == []


def test_one_iteration_in_containers_graded_by_the_official_harness(tasks, tmp_path):
    """The oracle teaches a tiny random model, which learns nothing in a step; what is tested is that all of it fits."""
    model = tiny.model_dir(tmp_path / "model", arch="llama", template="chatml")
    rows = [json.loads(line) for line in tasks.read_text().splitlines()]
    for name, some in (("train", rows[:3]), ("dev", rows[3:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    run = tmp_path / "run"
    done = loop(run, ITERATIONS=1, STUDENT=f"hf:{model}", SAMPLE=2, TASKS=tmp_path / "train.jsonl", WORKERS=2,
                EVAL_TASKS=tmp_path / "dev.jsonl", TEST_TASKS="", AGENT_FLAGS="--max-turns 9 --max-new-tokens 48",
                TRAIN_FLAGS="--epochs 1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the teacher itself: 2/2 = 100%" in done.stdout
    teacher = json.loads((run / "teacher/eval/summary.json").read_text())
    assert (teacher["grader"], teacher["rate_of_all"], teacher["infra_errors"]) == ("swebench", 1.0, 0)
    student = json.loads((run / "iter_001/eval/summary.json").read_text())
    assert (student["resolved"], student["infra_errors"]) == (0, 0)
    labels = [json.loads(line) for line in (run / "iter_001/labels.jsonl").read_text().splitlines()]
    assert labels and all(label["valid"] and label["source"] == "executed" for label in labels)
    assert ours() == []


def deleting_tests(row) -> str:
    source = next(r for r in task_rows.load("toy:dev:6") if r["instance_id"] == row["instance_id"])["local"]["source"]
    patch = ""
    for path in sorted(path for path in source if path.startswith("tests/")):
        lines = source[path].splitlines()
        patch += (f"diff --git a/{path} b/{path}\ndeleted file mode 100644\n--- a/{path}\n+++ /dev/null\n"
                  f"@@ -1,{len(lines)} +0,0 @@\n" + "".join(f"-{line}\n" for line in lines))  # fmt: skip
    return patch


@pytest.mark.parametrize("make, resolved", [(lambda row: row["patch"], 3), (lambda row: "", 0), (deleting_tests, 0)],
                         ids=["gold", "empty", "deletes the tests"])  # fmt: skip
def test_official_grades_of_toy_tasks(tasks, tmp_path, make, resolved):
    rows = [json.loads(line) for line in tasks.read_text().splitlines()][:3]
    given = tmp_path / "p.jsonl"
    given.write_text("".join(json.dumps({"instance_id": r["instance_id"], "model_patch": make(r)}) + "\n" for r in rows))
    done = script("04_eval.py", "--tasks", tasks, "--limit", 3, "--predictions", given, "--out", tmp_path / "graded")
    assert summary(done)["resolved"] == str(resolved) and summary(done)["infra_errors"] == "0"
