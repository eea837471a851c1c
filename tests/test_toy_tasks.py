"""The toy tasks are what they claim: valid, balanced, the same for everybody, and without names shared by splits."""

import builtins
import hashlib
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from common import prompts, toy_families, toy_tasks, toy_words
from common.errors import InputError
from common.grading import grade

SPLITS = sorted(toy_tasks.SIZES)
WORDS = ["dev", "study", "test", "train"]  # the splits whose names are their own; train2 has those of train, and so on


def apply(files: dict[str, str], patch: str) -> dict[str, str]:
    """What `git apply` does, strictly: every context line has to be there."""
    files = dict(files)
    for part in re.split(r"^diff --git .*\n", patch, flags=re.M)[1:]:
        old, new = re.match(r"--- a/(.*)\n\+\+\+ b/(.*)\n", part).groups()
        assert old == new
        lines, out, at = files[old].splitlines(keepends=True), [], 0
        for start, body in re.findall(r"^@@ -(\d+)\S* \S+ @@\n((?:[ +-].*\n)*)", part, flags=re.M):
            out += lines[at : int(start) - 1]
            at = int(start) - 1
            for line in body.splitlines(keepends=True):
                if line[0] in " -":
                    assert lines[at] == line[1:], (old, at)
                    at += 1
                if line[0] in " +":
                    out.append(line[1:])
        files[old] = "".join(out + lines[at:])
    return files


def run_tests(files: dict[str, str]) -> dict[str, bool]:
    """Every test of the suite, run in this process without pytest: id -> passed."""
    loaded = {}

    def load(name, *_):
        path = name.replace(".", "/") + ".py"
        if path not in loaded:
            module = types.ModuleType(name)
            module.__dict__["__builtins__"] = vars(builtins) | {"__import__": load, "print": lambda *a: None}
            loaded[path] = module
            exec(compile(files[path], path, "exec"), module.__dict__)
        return loaded[path]

    outcomes = {}
    for path in [p for p in files if p.startswith("tests/")]:
        for name, test in list(vars(load(path[:-3].replace("/", "."))).items()):
            if name.startswith("test_"):
                try:
                    test()
                    outcomes[f"{path}::{name}"] = True
                except Exception:
                    outcomes[f"{path}::{name}"] = False
    return outcomes


@pytest.mark.parametrize("split", SPLITS)
def test_every_task_is_valid(split):
    """FAIL_TO_PASS fails before the gold patch and passes after, PASS_TO_PASS passes both times, and that is all."""
    for row in toy_tasks.load(split):
        name = row["instance_id"]
        source = row["local"]["source"]
        with_tests = apply(source, row["test_patch"])
        fail, keep = set(row["FAIL_TO_PASS"]), set(row["PASS_TO_PASS"])
        before, after = run_tests(with_tests), run_tests(apply(with_tests, row["patch"]))
        assert before.keys() == after.keys() == fail | keep and not fail & keep, name
        assert {t for t, ok in before.items() if not ok} == fail, name
        assert all(after.values()), name
        seen = run_tests(source)
        assert any(not ok for ok in seen.values()) and sum(seen.values()) >= 5, name  # the agent can see it fail
        assert fail - seen.keys() and keep - seen.keys(), name  # and the test patch adds tests of both kinds
        assert not any(p.startswith("tests/") for p in re.findall(r"^\+\+\+ b/(.*)", row["patch"], flags=re.M))
        assert apply(source, row["patch"]) == source | toy_tasks.find(row).fixed


@pytest.mark.parametrize("split", SPLITS)
def test_a_wrong_first_try_is_seen_to_fail(split):
    """Whichever other option of its family stands at the place of the bug, a test that the agent can run fails."""
    for index in range(0, toy_tasks.SIZES[split], 5):
        task = toy_tasks.task(split, index)
        source = task.row["local"]["source"]
        fixed = source | task.fixed
        for edit in task.edits:
            other = [task.row["local"]["source"][edit.path].split("\n")[edit.number]] + wrong_lines(task, edit)
            for line in other:
                lines = fixed[edit.path].split("\n")
                lines[edit.number] = line
                assert not all(run_tests(fixed | {edit.path: "\n".join(lines)}).values()), (edit, line)


def wrong_lines(task, edit) -> list[str]:
    """Plausible wrong forms of a line: its operators and words replaced by their relatives."""
    before, right, after = edit.site
    swaps = [("max(", "min("), ("min(", "max("), ("max(", "sum("), (" + ", " - "), (" - ", " + "), (" < ", " <= "),
             (" <= ", " < "), (" > ", " >= "), (" >= ", " > "), (" and not ", " and "), (" and ", " or "), (" or ", " and "),
             ("upper", "lower"), ("lower", "title"), ("title", "upper"), ("return ", ""), ("default=0", "default=None"),
             ("default=-1", "default=0"), ("default=None", "default=0"), (", reverse=True", ""), ('"-"', '","')]  # fmt: skip
    return [before + right.replace(x, y, 1) + after for x, y in swaps if x in right]


def test_the_same_for_everybody():
    """Tasks are derived by hashlib: no dependence on PYTHONHASHSEED, on what was loaded before, or on how many."""
    code = (
        "import json, hashlib; from common import toy_tasks as t; "
        "print(hashlib.sha256(json.dumps(t.load('dev', 20), sort_keys=True).encode()).hexdigest())"
    )
    root = Path(toy_tasks.__file__).parents[1]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    here = json.dumps(toy_tasks.load("dev")[:20], sort_keys=True)
    assert there.stdout.strip() == hashlib.sha256(here.encode()).hexdigest(), there.stderr
    assert toy_tasks.load("train", 5) == toy_tasks.load("train")[:5]


@pytest.mark.parametrize("split", SPLITS)
def test_every_prefix_is_balanced(split):
    rows = toy_tasks.load(split)
    unseen = set() if split.startswith("train") else {f.__name__ for f in toy_families.UNSEEN}
    assert len(toy_families.SEEN) >= 10 and len(toy_families.UNSEEN) == 2
    if split.endswith("2"):
        shares = dict.fromkeys((f.__name__ for f in toy_families.TOLD), 4) | dict.fromkeys(unseen, 4)
        shares |= dict.fromkeys((f.__name__ for f in toy_families.COMPUTED), 5)
    else:
        shares = dict.fromkeys((f.__name__ for f in toy_families.SEEN), 1) | dict.fromkeys(unseen, 1)
    block = sum(shares.values())
    for n in (24, 40, *range(block, len(rows), block), len(rows)):  # in every whole block each as often as its share, then at most
        counts = Counter(r["family"] for r in rows[:n])
        assert counts.keys() <= shares.keys()
        for family, share in shares.items():
            assert n // block * share <= counts[family] <= (n // block + 1) * share
    assert {r["family"] for r in rows if r["unseen_family"]} == unseen
    assert Counter(r["kind"] for r in rows[:20]) == (toy_tasks.KINDS_2 if split.endswith("2") else toy_tasks.KINDS)


def test_splits_share_no_names_and_no_texts():
    words = [set(w for role in toy_words.POOLS for w in toy_words.words(split, role)) for split in WORDS]
    every = [w for role in toy_words.POOLS for w in toy_words.POOLS[role].split()]
    assert len(every) == len(set(every)) == sum(map(len, words))
    commits, texts, names = Counter(), [], []
    for split in SPLITS:
        rows = toy_tasks.load(split)
        commits.update({r["base_commit"] for r in rows})
        texts.append({r["problem_statement"] for r in rows})
        names.append(set())
        for row in rows:
            for path, text in row["local"]["source"].items():
                names[-1] |= set(path.removesuffix(".py").split("/")) | set(re.findall(r"def (\w+)\(", text))
                for given in re.findall(r"def \w+\((.*)\)", text):
                    names[-1] |= {p.split("=")[0] for p in given.split(", ") if p}
    assert sum(commits.values()) == len(commits) == sum(toy_tasks.SIZES.values())
    fixed = {"__init__", "tests", "pytest.ini"}
    for i, one in enumerate(SPLITS):
        for j, other in enumerate(SPLITS[:i]):
            if one.removesuffix("2") != other.removesuffix("2"):
                assert not texts[i] & texts[j]
                assert names[i] & names[j] == fixed


def test_the_issue_is_words_and_terse():
    for split in SPLITS:
        for row in toy_tasks.load(split):
            text = row["problem_statement"]
            for edit in toy_tasks.find(row).edits:
                assert not re.search(r"[+<>=/*\[\]\"]|default|return", text), text
                assert edit.site[1] not in text and edit.line.strip() not in text, text
            assert 4 <= len(text.split()) <= 40, text


def test_no_assertion_is_cut():
    """pytest cuts the line of a failing test at the width of the terminal; the fix would be in the part that is gone."""
    for split in SPLITS:
        for row in toy_tasks.load(split):
            width = int(row["local"]["env"]["COLUMNS"])
            for path, text in row["local"]["source"].items():
                if path.startswith("tests/"):
                    for name, body in re.findall(r"def (test_\w+)\(\):\n((?:    .*\n)+)", text):
                        for message in re.findall(r", '(.*)'$", body, flags=re.M):
                            line = f"FAILED {path}::{name} - AssertionError: {message}"
                            assert len(line) < width, line


def test_rows_are_swe_bench_rows():
    row = toy_tasks.load("dev", 1)[0]
    fields = "instance_id repo base_commit problem_statement patch test_patch FAIL_TO_PASS PASS_TO_PASS version".split()
    assert all(row[field] for field in fields)
    assert re.fullmatch(r"[0-9a-f]{40}", row["base_commit"]) and json.loads(json.dumps(row)) == row
    assert [m["content"] for m in prompts.opening(row)][1] == row["problem_statement"]


@pytest.mark.parametrize("split, n", [("trian", None), ("dev", 0), ("dev", 81)])
def test_bad_specs_are_input_errors(split, n):
    with pytest.raises(InputError, match="toy"):
        toy_tasks.load(split, n)


@pytest.mark.parametrize("kind", toy_tasks.KINDS)
def test_real_grading(kind):
    """The gold patch is resolved and the empty one is not, by the grader that 04_eval uses."""
    row = next(r for r in toy_tasks.load("test") if r["kind"] == kind)
    assert grade(row, row["patch"])["resolved"]
    empty = grade(row, "")
    assert not empty["resolved"] and empty["tests_status"]["PASS_TO_PASS"]["failure"] == []
    assert sorted(empty["tests_status"]["FAIL_TO_PASS"]["failure"]) == row["FAIL_TO_PASS"]


def real_pytest(rows: list[dict], folder: Path) -> None:
    """Patches by `git apply`, tests by pytest in a subprocess, before and after the gold patch."""
    folders = []
    for row in rows:
        for stage, patches in (("before", ["test_patch"]), ("after", ["test_patch", "patch"])):
            place = folder / row["instance_id"] / stage
            for path, text in row["local"]["source"].items():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                (place / path).write_text(text)
            for patch in patches:
                subprocess.run(["git", "apply", "-"], input=row[patch], text=True, check=True, cwd=place)
            folders.append(str(place))
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    script = [sys.executable, str(Path(__file__).with_name("toy_pytest.py")), *folders]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    for row in rows:
        before, after = (outcomes[str(folder / row["instance_id"] / s)] for s in ("before", "after"))
        assert sorted(t for t, o in before.items() if o == "failed") == row["FAIL_TO_PASS"]
        assert sorted(t for t, o in before.items() if o == "passed") == row["PASS_TO_PASS"]
        assert sorted(after) == sorted(before) and set(after.values()) == {"passed"}


def test_real_pytest_on_a_sample(tmp_path):
    real_pytest([row for split in SPLITS for row in toy_tasks.load(split)[::60]], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("part", range(10))
def test_real_pytest_on_all(split, part, tmp_path):
    real_pytest(toy_tasks.load(split)[part::10], tmp_path)
