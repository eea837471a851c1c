"""Task specs, files of rows, exclusion and the sample of each iteration."""

import json

import pytest

from common import tasks
from common.errors import InputError


def row(name, **more):
    return {
        "instance_id": name, "repo": "r/" + name, "base_commit": "c" + name, "problem_statement": "p", "patch": "",
        "test_patch": "", "FAIL_TO_PASS": ["t::a"], "PASS_TO_PASS": '["t::b"]', **more,
    }  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_files_of_each_kind(tmp_path):
    rows = [row("a"), row("b")]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    for spec in (write(tmp_path / "t.jsonl", rows), str(tmp_path / "t.json")):
        loaded = tasks.load(spec)
        assert [r["instance_id"] for r in loaded] == ["a", "b"]
        assert loaded[0]["PASS_TO_PASS"] == ["t::b"]
    assert len(tasks.load(str(tmp_path / "t.json") + ":1")) == 1
    assert len(tasks.load(str(tmp_path / "t.json"), limit=1)) == 1


def test_relative_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "repository").mkdir()
    path = write(tmp_path / "t.jsonl", [row("a", local={"source": "repository", "python": "venv/bin/python"})])
    local = tasks.load(path)[0]["local"]
    assert local == {"source": str(tmp_path / "repository"), "python": str(tmp_path / "venv/bin/python")}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("toys", "none of toy:train"),
        ("toy:nothing", "no split 'nothing'"),
        ("toy:dev:100000", "dev has"),
        ("swe-bench", "none of toy:train"),
        ("missing.jsonl", "No such file"),
        ("missing.json", "no such file"),
    ],
)
def test_unknown_specs(spec, message):
    with pytest.raises(InputError, match=message):
        tasks.load(spec)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "the list is empty"),
        ([row("a"), {"instance_id": "b"}], ":2: task: field 'repo' is missing"),
        ([row("a"), row("a")], "'a' is there twice"),
        ([row("a", FAIL_TO_PASS="nonsense")], "FAIL_TO_PASS"),
        ([row("a", local={})], "needs 'source'"),
        ([row("a", local={"source": "/nowhere/at/all"})], ":1: a: the repository /nowhere/at/all is missing"),
    ],
)
def test_bad_rows_name_file_line_and_field(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        tasks.load(write(tmp_path / "t.jsonl", lines))


def test_exclusion_by_id_and_by_commit(tmp_path):
    held_out = write(tmp_path / "held.jsonl", [row("a"), row("z") | {"repo": "r/b", "base_commit": "cb"}])
    kept, gone = tasks.exclude([row("a"), row("b"), row("c")], [held_out])
    assert [r["instance_id"] for r in kept] == ["c"] and gone == 2
    with pytest.raises(InputError, match="leaves no task"):
        tasks.exclude([row("a")], [held_out])


def test_iterations_collect_on_other_tasks_and_wrap_round():
    rows = [row(str(n)) for n in range(10)]
    chosen = [[r["instance_id"] for r in tasks.sample(rows, 4, i, seed=3)] for i in (1, 2, 3)]
    assert len(set(chosen[0] + chosen[1])) == 8
    assert chosen[2][2:] == chosen[0][:2]  # places 8, 9, then 0, 1
    assert chosen[0] != [r["instance_id"] for r in tasks.sample(rows, 4, 1, seed=4)]
    assert len(tasks.sample(rows, 99, 1, seed=3)) == 10
