"""The study's analysis (tests/bench/study.py): what it counts, and what it refuses to count."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.test_metrics import lines

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import study  # noqa: E402


def episode(*turns):
    """turns: (command, exit code)."""
    messages = [{"role": "system"}, {"role": "user"}]
    for command, code in turns:
        messages += [{"role": "assistant", "command": command}, {"role": "user", "exit_code": code}]
    return messages


EDIT, TEST = "sed -i 's/a/b/' x.py", "pytest"


@pytest.mark.parametrize("turns, found", [
    ([(TEST, 1), (EDIT, 0), (TEST, 0)], (False, False)),  # a test before the first edit is no error
    ([(EDIT, 0), (TEST, 1)], (True, False)),
    ([(EDIT, 0), (TEST, 1), ("cat x.py", 0), (EDIT, 0), (TEST, 0)], (True, True)),
    ([(EDIT, 0), (EDIT, 0), (TEST, 1)], (True, False)),  # the second edit came before the test
    ([(EDIT, 0), (TEST, 0), (EDIT, 0), (TEST, 1)], (False, False)),  # the first test run counts
    ([(EDIT, 0), (None, None), ("python -m pytest", 2), (TEST, 1)], (True, False)),
    ([(EDIT, 0), ("submit", None)], (False, False)),  # never tested
    ([], (False, False)),
])  # fmt: skip
def test_whose_first_test_after_the_first_edit_failed(turns, found):
    messages = episode(*turns)
    assert study.erred(messages) == found
    assert study.erred(messages[:-1]) == found or turns[-1][0] == TEST  # a submission has no observation


def test_the_match_by_tasks_takes_the_trajectories_that_02_would_take(tmp_path):
    """Dagger has labels from two, three and one trajectories; of sft's, with 2 to 6 turns, 02 takes so many whole ones."""
    choose_states = runpy.run_path(Path(__file__).parent.parent / "02_relabel.py")["choose_states"]
    turns, used = {f"t{n}.i1.a0": n for n in range(2, 7)}, (2, 3, 1)
    said = {"role": "assistant", "actor": "teacher", "logprob": None}
    records = [{"trajectory_id": name, "messages": [said | {"turn": turn} for turn in range(n)]} for name, n in turns.items()]
    for iteration, number in enumerate(used, 1):
        home = f"iter_00{iteration}"
        labels = [{"trajectory_id": f"d{n}", "turn": turn} for n in range(number) for turn in range(4)]
        lines(tmp_path / "dagger-7" / home / "labels.jsonl", labels)
        lines(tmp_path / "sft-7" / home / "trajectories.jsonl", records)
    for number, most in zip(used, study.match_tasks(tmp_path, 7).split(",")):
        args = argparse.Namespace(max_labels=int(most), seed=7, label_states="all")
        taken = [name for name, _ in choose_states(args, {record["trajectory_id"]: record for record in records})]
        assert len(set(taken)) == number and all(taken.count(name) == turns[name] for name in taken)


def made(arm, seed=3):
    """The manifests of a run as it was promised."""
    stages = {}
    for i in (1, 2, 3):
        collect = {"teacher": "oracle", "sample": 64} | study.OF_ARM["sft" if i == 1 and arm not in ("rft", "aggrevate") else arm]
        stages[i] = {
            "collect": {"settings": study.MADE["collect"] | collect, "summary": {}},
            "relabel": {"settings": study.MADE["relabel"] | {"keep": "resolved" if arm == "rft" else "all", "max_labels": 300,
                                                             "teacher": collect["teacher"]}, "summary": {}},
            "train": {"settings": study.MADE["train"] | {"init_adapter": None if i == 1 else "x"}, "summary": {"labels": 300, "steps": 90}},
            "eval": {"settings": study.MADE["eval"], "summary": {}},
        }  # fmt: skip
    return {i: {name: {part: dict(found[part]) | ({"seed": seed} if part == "settings" else {}) for part in found}
                for name, found in of.items()} for i, of in stages.items()}  # fmt: skip


@pytest.mark.parametrize("arm", ["sft", "dagger", "dagger-paper", "aggrevate", "rft"])
@pytest.mark.parametrize("stage, part, change, words", [
    (None, None, {}, None),
    ("collect", "settings", {"mix": "student"}, "iteration 2: collect: mix is student, not "),
    ("collect", "settings", {"seed": 4}, "iteration 2: collect: seed is 4, not 3"),
    ("collect", "summary", {"infra_errors": 1}, "iteration 2: collect: failures of the machine"),
    ("relabel", "summary", {"infra_errors": 1}, "iteration 2: relabel: failures of the machine"),
    ("relabel", "settings", {"keep": "none"}, "iteration 2: relabel: keep is none, not "),
    ("train", "settings", {"lr": 1e-3}, "iteration 2: train: lr is 0.001, not 0.002"),
    ("train", "settings", {"init_adapter": None}, "iteration 2: train: it goes on from None"),
    ("train", "summary", {"labels": 299}, "iteration 2: train: 299 labels of 300, 90 steps of 90"),
    ("train", "summary", {"steps": 89}, "iteration 2: train: 300 labels of 300, 89 steps of 90"),
    ("eval", "summary", {"exit_time_limit": 1}, "iteration 2: eval: failures of the machine or a time limit"),
    ("test", "summary", {"infra_errors": 1}, "iteration 0: test: failures of the machine"),
    ("grades", "summary", {"infra_errors": 1}, "iteration 2: grades: failures of the machine"),
])  # fmt: skip
def test_a_run_that_is_not_as_promised_gets_no_line(tmp_path, arm, stage, part, change, words):
    stages = made(arm)
    extra = {"test": tmp_path / "test/iter_003/manifest.json", "grades": tmp_path / "iter_002/grades/manifest.json"}
    tested = {"finished": 1.0, "settings": study.MADE["eval"] | {"tasks": "toy:study2", "seed": 3}, "summary": {}}
    graded = {"finished": 1.0, "settings": {"seed": 3}, "summary": {}}
    found = {"test": tested, "grades": graded} | stages[2]
    if stage:
        found[stage][part] = found[stage][part] | change
    for path in (extra["test"], *(tmp_path / f"iter_00{i}/grades/manifest.json" for i in (1, 2, 3))):
        path.parent.mkdir(parents=True)
        content = tested if path == extra["test"] else found["grades"] if path == extra["grades"] else graded | {"summary": {}}
        path.write_text(json.dumps(content))
    if not words or (stage == "grades" and arm != "rft"):
        return study.check(tmp_path, stages, extra["test"].parent, arm, 3)
    with pytest.raises(SystemExit, match=words):
        study.check(tmp_path, stages, extra["test"].parent, arm, 3)
