"""The loss of single labels, before training and after: what covariate shift is measured with."""

import json

import numpy as np
import pytest

from common import models, prefix_tree, training
from common.hf_policy import hash_adapter
from common.prefix_tree import Sample
from tests.records import label, tokenised, trajectory, write
from tests.test_train_script import home, reference_loss, script, summary  # noqa: F401  home is a fixture


def nll_lines(path):
    return {(line["trajectory_id"], line["turn"]): line for line in map(json.loads, path.read_text().splitlines())}


def test_the_loss_of_labels_before_and_after(home, tmp_path):
    """After: what a dry run on the new adapter says of each label. Before: under the student that collected, which is
    the base, the adapter that training went on from, or (with all labels, from a fresh adapter) the last one."""
    base = home / "base"
    common = ("--model", base, "--epochs", 2, "--lr", "5e-3", "--batch-size", 2)

    def dry(data, adapter):
        script("--data", data, "--model", base, *(["--init-adapter", adapter] if adapter else []), "--dry-run", "--out",
               tmp_path / "none", "--label-nll", tmp_path / "nll.jsonl")  # fmt: skip
        assert not (tmp_path / "none").exists()
        return {key: line["before"] for key, line in nll_lines(tmp_path / "nll.jsonl").items()}

    def collected_by(directory, adapter, name):
        records = [trajectory(f"{name}-{n}", seed=n) for n in range(5)]
        who = {"model": f"hf:{base}", "adapter": adapter and str(adapter), "extra": {},
               "adapter_hash": adapter and hash_adapter(adapter)}  # fmt: skip
        for record in records:
            record["student"] = who
        write(directory, records, [label(r, turn) for r in records for turn in range(3)])
        return directory

    first = collected_by(tmp_path / "iter_001", None, "a")
    script("--data", first, *common, "--out", tmp_path / "one")
    lines = nll_lines(tmp_path / "one/label_nll.jsonl")
    assert len(lines) == 15
    for name, adapter in (("before", None), ("after", tmp_path / "one")):
        expected = dry(first, adapter)
        assert {key: line[name] for key, line in lines.items()} == pytest.approx(expected, rel=1e-4)
    assert sum(line["after"] for line in lines.values()) < 0.9 * sum(line["before"] for line in lines.values())
    for record in map(json.loads, (first / "trajectories.jsonl").read_text().splitlines()):
        actors = [m["actor"] for m in record["messages"] if m["role"] == "assistant"]
        for turn in range(3):
            assert lines[record["trajectory_id"], turn]["student_turns"] == actors[:turn].count("student")
    # by hand: the mean over tokens of what the definition gives
    (samples, *_), _ = tokenised([str(first)], models.load_tokenizer(str(base))[0])
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base)
    for turn, one in enumerate(samples):
        assert lines["a-0.i1.a0", turn]["before"] == pytest.approx(reference_loss(plain, [one]) / one.n_label, rel=1e-4)
        assert lines["a-0.i1.a0", turn]["tokens"] == one.n_label

    second = collected_by(tmp_path / "iter_002", tmp_path / "one", "b")
    expected = dry(second, tmp_path / "one")
    script("--data", second, *common, "--init-adapter", tmp_path / "one", "--out", tmp_path / "current", "--measure", 2)
    script("--data", first, second, *common, "--out", tmp_path / "union")
    unmeasured = script("--data", first, second, *common, "--measure", 0, "--out", tmp_path / "unmeasured")
    assert summary(unmeasured)["loss"] == summary(script("--data", first, second, *common, "--out", tmp_path / "union"))["loss"]
    assert not (tmp_path / "unmeasured/label_nll.jsonl").exists()
    for name, number in (("current", 6), ("union", 15)):
        lines = nll_lines(tmp_path / name / "label_nll.jsonl")
        assert len(lines) == number and lines.keys() <= expected.keys()
        assert {key: line["before"] for key, line in lines.items()} == pytest.approx(
            {key: expected[key] for key in lines}, rel=1e-4)  # fmt: skip
    one = (tmp_path / "unmeasured/adapter_model.safetensors").read_bytes()
    assert one == (tmp_path / "union/adapter_model.safetensors").read_bytes()  # measuring leaves no trace

    (tmp_path / "one").rename(tmp_path / "gone")
    lost = script("--data", first, second, *common, "--out", tmp_path / "lost")
    assert "the student that collected cannot be loaded" in lost[1]
    assert {line["before"] for line in nll_lines(tmp_path / "lost/label_nll.jsonl").values()} == {None}


def test_measuring_is_shared_between_processes(monkeypatch):
    shares = []
    for rank in range(4):
        processes = object.__new__(training.Processes)
        processes.rank, processes.size, loads = rank, 4, [0.0] * 4
        batches = [prefix_tree.pack_tree([Sample("s", np.arange(n + 4, dtype=np.int32), 2)], [1.0], 64)
                   for n in range(32)]  # fmt: skip
        shares.append([batch.n_rows for of in batches for batch in processes.share(of, 0.0, loads)])
    assert sorted(n for share in shares for n in share) == list(range(4, 36))
    assert [len(share) for share in shares] == [8] * 4  # one after the other, not all for the first
