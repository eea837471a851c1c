"""The whole loop: on a tiny random model in the default tests, on the real one (slow)."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parent.parent


def loop(run, **knobs):
    # The scripts of the loop must not find a GPU here that a test of a tiny model has no use for.
    done = subprocess.run(
        [ROOT / "run_loop.sh"], capture_output=True, text=True, cwd="/",
        env=os.environ | {"RUN": str(run)} | {name: str(value) for name, value in knobs.items()},
    )  # fmt: skip
    return done


@pytest.mark.parametrize("iterations", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_loop_turns_resumes_and_goes_on(tmp_path, iterations):
    """One iteration; again, which does nothing; another seed, which is refused; (slow) a test split, one iteration more."""
    model = tiny.model_dir(tmp_path / "model", arch="llama", template="chatml")
    run, locked = tmp_path / "run", "toy:test:2" if iterations > 1 else ""
    knobs = {
        "STUDENT": f"hf:{model}", "SAMPLE": 2, "EVAL_TASKS": "toy:dev:2", "TEST_TASKS": locked, "WORKERS": 2,
        "AGENT_FLAGS": "--max-turns 3 --max-new-tokens 8", "TRAIN_FLAGS": "--epochs 1",
    }  # fmt: skip
    first = loop(run, ITERATIONS=1, **knobs)
    assert first.returncode == 0, first.stderr
    assert "best on toy:dev:2: iteration 1" in first.stdout
    if locked:
        assert re.search(r"on toy:test:2, iteration 1 \(chosen\): \d/2", first.stdout)
    assert re.search(r"the teacher itself: \d/2", first.stdout)
    page = (run / "report.html").read_text()
    assert "toy-dev-0001" in page and page.endswith("</html>\n")
    assert json.loads((run / "iter_001/summary.json").read_text())["eval"]["tasks"] == 2
    summary = json.loads((run / "iter_001/trajectories.jsonl.manifest.json").read_text())["summary"]
    assert summary["beta"] == summary["teacher_turn_share"] == 1.0

    def files_of(run):  # the report is written anew, and says when
        names = ("report.html", "summary.json")
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name not in names}

    files = files_of(run)
    again = loop(run, ITERATIONS=1, **knobs)
    assert again.returncode == 0 and again.stdout == first.stdout
    assert again.stderr.count("nothing to do") == (7 if locked else 6)
    assert files_of(run) == files

    other = loop(run, ITERATIONS=2, SEED=1, **knobs)
    assert other.returncode == 2 and "seed = 0, now it is 1" in other.stderr
    if iterations == 1:
        return

    more = loop(run, ITERATIONS=2, **knobs)
    assert more.returncode == 0, more.stderr
    assert (run / "iter_002/adapter/adapter_model.safetensors").exists()
    assert json.loads((run / "iter_002/trajectories.jsonl.manifest.json").read_text())["summary"]["beta"] == 0.5
    made = json.loads((run / "iter_002/adapter/manifest.json").read_text())
    assert made["summary"]["labels"] == len((run / "iter_002/labels.jsonl").read_text().splitlines())
    assert made["settings"]["init_adapter"] == str(run / "iter_001/adapter")  # it goes on from the last adapter


@pytest.mark.slow
def test_the_real_student_learns_something_with_nf4(tmp_path):
    """SmolLM2-135M, an NF4 base, one iteration of SFT on the expert: fewer tasks and steps than the default run."""
    done = loop(
        tmp_path / "run", ITERATIONS=1, SAMPLE=24, EVAL_TASKS="toy:dev:12", TEST_TASKS="", LR="1e-3",
        TRAIN_FLAGS="--quant nf4", STUDENT="hf:smollm2-135m,quant=nf4", WORKERS=12,
        AGENT_FLAGS="--max-turns 8 --max-new-tokens 48",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    log = [json.loads(line) for line in (run / "iter_001/adapter/training_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    before = json.loads((run / "iter_000/eval/summary.json").read_text())
    after = json.loads((run / "iter_001/eval/summary.json").read_text())
    assert before["resolved"] <= 1
    assert json.loads((run / "teacher/eval/summary.json").read_text())["rate"] == 1.0
    # It has learnt the form of the work: commands instead of prose, and an end.
    assert after.get("exit_submitted", 0) > before.get("exit_submitted", 0)
