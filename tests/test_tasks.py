"""Task specs, files and data sets of rows, exclusion and the sample of each iteration."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import official, repositories, run, tasks
from common.errors import InputError, StageError

ROOT = Path(__file__).resolve().parent.parent


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


def git(folder, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_hash_of_local_tasks_is_that_of_their_contents(tmp_path):
    """A repository may be moved with its task file; a file in it may not change under a run that was begun."""
    hashes = []
    for place in ("here", "there"):
        (tmp_path / place / "repository/a").mkdir(parents=True)
        (tmp_path / place / "repository/a/b.py").write_text("x = 1\n")
        path = write(tmp_path / place / "t.jsonl", [row("a", local={"source": "repository", "python": "python"})])
        hashes.append(tasks.hash_rows(tasks.load(str(path))))
    (tmp_path / "there/repository/a/b.py").write_text("x = 2\n")
    hashes.append(tasks.hash_rows(tasks.load(str(path))))
    assert hashes[0] == hashes[1] != hashes[2]
    toys = tasks.load("toy:train:2")
    assert tasks.hash_rows(toys) == run.hash_json(toys)  # inline sources are contents already


def test_a_row_that_wants_a_patch_names_no_tests(tmp_path):
    """The issue and the repository are enough; the rows of a git repository are of its HEAD."""
    for name in ("plain", "git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1\n")
    git(tmp_path / "git", "init", "-q")
    bare = [{"instance_id": name, "problem_statement": "p", "local": {"source": name}} for name in ("plain", "git")]
    path = write(tmp_path / "t.jsonl", bare)
    with pytest.raises(InputError, match="git is a git repository without a commit"):
        tasks.load(path)
    git(tmp_path / "git", "add", "-A")
    git(tmp_path / "git", "commit", "-qm", "one")
    plain, of_git = tasks.load(path)
    assert plain["FAIL_TO_PASS"] == plain["PASS_TO_PASS"] == [] and plain["patch"] == plain["base_commit"] == ""
    assert (of_git["repo"], of_git["base_commit"]) == ("git", git(tmp_path / "git", "rev-parse", "HEAD"))
    with pytest.raises(InputError, match="git: FAIL_TO_PASS and PASS_TO_PASS name no test"):
        official.choose([of_git], "auto")
    for half in ("patch", "test_patch", "FAIL_TO_PASS"):  # who names one of these means to have it graded
        with pytest.raises(InputError, match="field '.*' is missing"):
            tasks.load(write(tmp_path / "half.jsonl", [bare[1] | {half: row("a")[half]}]))


def test_a_name_of_a_commit_is_the_commit_that_it_means(tmp_path):
    """Tomorrow HEAD is another one: then it is other work, and another state for --exclude-tasks."""
    (tmp_path / "git").mkdir()
    git(tmp_path / "git", "init", "-q")
    path, found = write(tmp_path / "t.jsonl", [row("a", base_commit="HEAD", local={"source": "git"})]), []
    for content in ("1", "2"):
        (tmp_path / "git/a.py").write_text(content)
        git(tmp_path / "git", "add", "-A")
        git(tmp_path / "git", "commit", "-qm", content)
        (one,) = tasks.load(path)
        assert one["base_commit"] == git(tmp_path / "git", "rev-parse", "HEAD")
        found.append(tasks.hash_rows([one]))
    assert found[0] != found[1]
    with pytest.raises(InputError, match="git is a git repository without a commit nowhere"):
        tasks.load(write(tmp_path / "t.jsonl", [row("a", base_commit="nowhere", local={"source": "git"})]))


def test_unpacking_stays_below_its_directory(tmp_path):
    for name in ("../../escaped.txt", "/tmp/escaped.txt"):
        path = write(tmp_path / "t.jsonl", [row("a", local={"source": {name: "x"}})])
        done = subprocess.run([sys.executable, "-m", "common.tasks", path, "--unpack", tmp_path / "un/packed"], cwd=ROOT,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 2 and f"a: local.source: bad path {name!r}" in done.stderr
    assert not (tmp_path / "escaped.txt").exists()
    path = write(tmp_path / "t.jsonl", [row("a", local={"source": {"b/c.py": "x = 1\n"}})])
    done = subprocess.run([sys.executable, "-m", "common.tasks", path, "--unpack", tmp_path / "packed"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert json.loads(done.stdout)["local"]["source"] == str(tmp_path / "packed/a")
    assert (tmp_path / "packed/a/b/c.py").read_text() == "x = 1\n"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("toys", "none of toy:train"),
        ("toy:dev:\u00b2", "no split"),
        ("toy:nothing", "no split 'nothing'"),
        ("toy:dev:100000", "dev has"),
        ("swe-bench", "none of toy:train"),
        ("swe-gym", "swe-gym:train|holdout"),
        ("swe-gym:test", "none of toy:train"),
        ("swe-bench-verifed:5", "none of toy:train"),
        ("dataset:someone/something", "dataset:NAME:SPLIT"),
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
        ([row("a", FAIL_TO_PASS=[1])], ":1: FAIL_TO_PASS and PASS_TO_PASS must be lists of the names of tests"),
        ([row("a", local={})], "needs 'source'"),
        ([row("a", local={"source": ""})], ":1: field 'local' needs 'source'"),
        ([row("a", local={"source": ".", "env": {"A=B": "x"}})], "env: 'A=B' cannot be a variable"),
        ([row("a", local={"source": ".", "env": {"A": "x\0"}})], "env: 'A' cannot be a variable"),
        ([row("a", local={"source": 3})], ":1: field 'local' needs 'source'"),
        ([row("a", local={"source": {"a.py": 3}})], ":1: field 'local' needs 'source'"),
        ([row("a", local={"source": ".", "python": 3})], ":1: field 'local': python must be a text, not int"),
        ([row("a", local={"source": ".", "test_cmd": ["pytest"]})], "test_cmd must be a text, not list"),
        ([row("a", local={"source": ".", "setup": "make"})], "setup must be a list of commands"),
        ([row("a", local={"source": ".", "env": ["A=1"]})], "env must be an object of names and texts"),
        ([row("a", prompt=["toy"])], ":1: task: field 'prompt' must be str or null, not list"),
        ([row("me/a")], ":1: instance_id 'me/a': it may have letters, digits and _ . - only"),
        ([row("../a")], "instance_id '../a'"),
        ([row("a", local={"source": "/nowhere/at/all"})], ":1: a: the repository /nowhere/at/all is missing"),
        ([row("a"), row("b", image=["x"])], ":2: task: field 'image' must be str or null, not list"),
        ([row("a", eval_script={})], ":1: task: field 'eval_script' must be str or null"),
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
    # a plain directory has no commit, and two of them may have one name
    plain = [row("a") | {"repo": "src", "base_commit": ""}, row("b") | {"repo": "src", "base_commit": ""}]
    assert tasks.exclude(plain[:1], [write(tmp_path / "plain.jsonl", plain[1:])]) == (plain[:1], 0)


def test_iterations_collect_on_other_tasks_and_wrap_round():
    rows = [row(str(n)) for n in range(10)]
    chosen = [[r["instance_id"] for r in tasks.sample(rows, 4, i, seed=3)] for i in (1, 2, 3)]
    assert len(set(chosen[0] + chosen[1])) == 8
    assert chosen[2][2:] == chosen[0][:2]  # places 8, 9, then 0, 1
    assert chosen[0] != [r["instance_id"] for r in tasks.sample(rows, 4, 1, seed=4)]
    assert len(tasks.sample(rows, 99, 1, seed=3)) == 10


def test_exclusion_takes_the_first_n_of_a_spec(tmp_path):
    """run_loop.sh hands EVAL_TASKS and TEST_TASKS over as they are: with :N only those N are left out."""
    held_out = write(tmp_path / "held.jsonl", [row("a"), row("b"), row("c")])
    kept, gone = tasks.exclude([row("a"), row("b"), row("c")], [held_out + ":1", held_out + ":2"])
    assert [r["instance_id"] for r in kept] == ["c"] and gone == 2
    loop = (ROOT / "run_loop.sh").read_text()
    assert '--exclude-tasks "$EVAL_TASKS" ${TEST_TASKS:+"$TEST_TASKS"}' in loop


# ---------------------------------------------------------------------------------------------------- data sets


@pytest.fixture
def hub(monkeypatch):
    """A hub with the data sets that are put into the returned dict: (name, split) -> rows."""
    import datasets

    held = {}

    def load_dataset(name, split):
        if (name, split) not in held:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.\nMore lines")
        return datasets.Dataset.from_list(held[name, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return held


@pytest.mark.parametrize(
    "spec, name, split",
    [
        ("swe-bench-verified", "SWE-bench/SWE-bench_Verified", "test"),
        ("swe-bench-lite", "SWE-bench/SWE-bench_Lite", "test"),
        ("swe-gym-lite", "SWE-Gym/SWE-Gym-Lite", "train"),
        ("dataset:someone/something:dev", "someone/something", "dev"),
    ],
)
def test_data_sets(hub, spec, name, split):
    hub[name, split] = [row("a", created_at=datetime.datetime(2023, 1, 2)), row("b", created_at=None)]
    rows = tasks.load(spec)
    assert [r["instance_id"] for r in rows] == ["a", "b"]
    assert rows[0]["created_at"] == "2023-01-02 00:00:00"  # printed as JSON, and hashed
    assert rows[0]["FAIL_TO_PASS"] == ["t::a"] and rows[0]["PASS_TO_PASS"] == ["t::b"]
    assert len(tasks.load(spec + ":1")) == len(tasks.load(spec, limit=1)) == 1


def test_a_bad_row_of_a_data_set_is_named(hub):
    hub["x/y", "train"] = [row("a"), {k: v for k, v in row("b").items() if k != "patch"}]
    with pytest.raises(InputError, match=r"x/y:train\[1\]: task: field 'patch' must be str, not NoneType"):
        tasks.load("dataset:x/y:train")


def test_swe_gym_holds_out_the_committed_hundred(hub, capsys):
    listed = (ROOT / "common" / "swe_gym_holdout.txt").read_text().split()
    assert len(set(listed)) == 100 and listed == sorted(listed)
    others = [f"dask__dask-{n}" for n in range(300)]
    assert not set(listed) & set(others)
    hub["SWE-Gym/SWE-Gym", "train"] = [row(name) for name in others + listed[::-1]]
    assert [r["instance_id"] for r in tasks.load("swe-gym:train")] == others
    assert [r["instance_id"] for r in tasks.load("swe-gym:holdout")] == listed[::-1]
    assert [r["instance_id"] for r in tasks.load("swe-gym:holdout:3")] == listed[:-4:-1]
    assert capsys.readouterr().err == ""
    hub["SWE-Gym/SWE-Gym", "train"] = [row(name) for name in listed[:98]]
    assert len(tasks.load("swe-gym:holdout")) == 98
    assert "has 2 of the 100 held-out tasks no more" in capsys.readouterr().err


def test_plain_rows_are_completed_and_others_stay(hub, tmp_path):
    nothing = dict.fromkeys(repositories.ADDED)  # a data set has every column in every row
    dask = row("dask__dask-7656", repo="dask/dask", version="2021.04", **nothing)
    full = row("pallets__flask-1", repo="pallets/flask", version="2.3", image="i", log_parser="parse_log_flask",
               eval_type="pass_and_fail", eval_script="true")  # fmt: skip
    given = [dask, full, row("unknown", version=None, **nothing)]
    hub["x/y", "train"] = given
    for rows in (tasks.load("dataset:x/y:train"), tasks.load(write(tmp_path / "t.jsonl", given))):
        assert rows[0]["image"] == "xingyaoww/sweb.eval.x86_64.dask_s_dask-7656:latest"
        assert "\npytest -n0 -rA --color=no t\n" in rows[0]["eval_script"]
        assert {f: rows[1][f] for f in repositories.ADDED} == {f: full[f] for f in repositories.ADDED}


@pytest.mark.parametrize(
    "error, raised",
    [
        (ConnectionError("Couldn't reach 'x/y' on the Hub (OfflineModeIsEnabled)"), StageError),
        (OSError(28, "No space left on device"), StageError),
        (RuntimeError(), StageError),
        (ValueError('Unknown split "trian". Should be one of [\'train\'].'), InputError),
        (FileNotFoundError("Couldn't find any data file"), InputError),
    ],
)
def test_what_can_go_wrong_with_a_data_set(monkeypatch, error, raised):
    import datasets

    def fail(*args, **more):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(raised, match="data set 'x/y'") as caught:
        tasks.load("dataset:x/y:trian")
    assert "\n" not in str(caught.value)


def test_a_misspelt_data_set(hub):
    with pytest.raises(InputError, match="'x/z', split 'train': Dataset 'x/z' doesn't exist on the Hub.$"):
        tasks.load("dataset:x/z:train")


@pytest.mark.slow
def test_data_sets_on_the_command_line(tmp_path):
    """Real `datasets`: a local directory of parquet files, the hub out of reach, a directory that is not there."""
    import datasets

    flask = row("pallets__flask-1", repo="pallets/flask", version="2.3")
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list([flask, row("b")]).to_parquet(tmp_path / "data" / "test.parquet")
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def written(spec, code):
        done = subprocess.run([sys.executable, "-m", "common.tasks", spec], capture_output=True, text=True, env=env,
                              cwd=ROOT)  # fmt: skip
        assert done.returncode == code, done.stderr
        return done

    rows = [json.loads(line) for line in written(f"dataset:{tmp_path / 'data'}:test", 0).stdout.splitlines()]
    assert [r["instance_id"] for r in rows] == ["pallets__flask-1", "b"]
    assert rows[0]["image"] == "swebench/sweb.eval.x86_64.pallets_1776_flask-1:latest" and "image" not in rows[1]
    for spec, code in (("swe-bench-verified:1", 1), (f"dataset:{tmp_path / 'none'}:test", 2),
                       (f"dataset:{tmp_path / 'data'}:tset", 2)):  # fmt: skip
        message = written(spec, code).stderr.strip()
        assert "Traceback" not in message and "data set" in message.splitlines()[-1], message
