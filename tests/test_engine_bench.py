"""The rollout engine against the fastest that any could be: the real 01_collect.py, simulated server and environments."""

from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent / "bench"


@pytest.mark.slow
def test_64_workers_keep_the_server_busy(tmp_path, monkeypatch):
    """128 trajectories of 4 turns, 8 answers at once: 40 s of decoding. An engine that starts trajectories in batches, or
    holds a place while a command runs, takes far more; the bench's aim is 1.05, here others may use the machine."""
    monkeypatch.syspath_prepend(BENCH)
    import engine
    import simulated

    plan = simulated.Plan(tasks=128, turns=4, tokens=80, rate=128, at_once=8, spread=0.5, slots=32)
    got = engine.measure(plan, lambda port: engine.ours(plan, 64, tmp_path / "run", port), tmp_path / "run")
    assert (got["turns"], got["again"]) == (4 * 128, 0)
    assert 1.0 <= got["wall"] / max(plan.limits().values()) < 1.3
