"""The measurements of tests/bench run, on as little as they take. Their figures are no matter here.

Two of them once called an older shape of the training data, and nobody saw it. (The engine's are in test_engine.py; the
peer's trainer is in test_export_real.py; that of prefix caches takes vLLM and minutes.)
"""

import subprocess
import sys
from pathlib import Path

import docker_images
import pytest

from tests import tiny

BENCH = Path(__file__).parent / "bench"


def bench(name: str, *args) -> list[list[str]]:
    """The cells of the table that it prints, without its head."""
    done = subprocess.run([sys.executable, BENCH / name, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert set(rows[1]) == {"---"}
    return [row for row in rows[2:] if set(row) != {"---"}]


@pytest.mark.slow
def test_training(tmp_path):
    model = tiny.model_dir(tmp_path)
    ((trajectories, turns, tokens, *_, computed),) = bench(
        "prepare.py", "--model", model, "--trajectories", 2, "--turns", 3, "--tokens", 600)  # fmt: skip
    assert (trajectories, turns) == ("2", "3") and int(tokens) > 300 and 0.9 < float(computed) <= 2
    tree, per_turn = bench("packing.py", "--model", model, "--turns", 4, "--trajectories", 1, "--rounds", 1)
    assert (tree[3], per_turn[3]) == ("tree", "per-turn") and int(tree[4]) < int(per_turn[4])


@pytest.mark.slow
def test_report():
    (found,) = bench("report.py", "--trajectories", 20, "--turns", 3)
    assert found[0] == "20"


@pytest.mark.slow
@pytest.mark.docker
@pytest.mark.skipif(bool(docker_images.why_not()), reason=str(docker_images.why_not()))
def test_sandboxes():
    assert [row[0] for row in bench("sandboxes.py", "--commands", 2, "--idle", 2)] == ["bash", "bubblewrap", "docker"]


@pytest.mark.parametrize("results", ["study.jsonl", "study_first.jsonl"])
def test_tables_of_the_study(results):
    rows = bench("study.py", "tables", BENCH / results)
    assert {"sft", "dagger"} <= {row[0] for row in rows}
    (found,) = [row for row in rows if row[0] == "dagger - sft"]
    assert float(found[4]) == pytest.approx(float(found[3].rstrip("%")) - float(found[2].rstrip("%")), abs=0.11)
