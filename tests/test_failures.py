"""Why tasks stay unresolved: the failure modes of patches and logs, each against a hand-made case."""

import pytest

from common import failures, grading, metrics, tasks


ROW = tasks.load("toy:dev:1")[0]
FILES = ROW["local"]["source"]
GOLD_FILE = next(iter(failures.files_of(ROW["patch"])))
OTHER_FILE = next(path for path in FILES if path.endswith(".py") and "/" in path and not path.startswith("tests/")
                  and path != GOLD_FILE and "def " in FILES[path])  # fmt: skip


def at_the_top(path, line):
    """A patch that puts a line at the top of a file."""
    first = FILES[path].split("\n")[0]
    return f"--- a/{path}\n+++ b/{path}\n@@ -1 +1,2 @@\n+{line}\n {first}\n"


@pytest.mark.parametrize("patch, mode", [
    (ROW["patch"], None), ("", "no_patch"), ("no patch\n", "patch_not_applied"),
    (at_the_top(GOLD_FILE, "def"), "broken_code"), (at_the_top(OTHER_FILE, "import nowhere"), "broken_code"),
    (at_the_top(OTHER_FILE, "# here"), "wrong_file"), (at_the_top(GOLD_FILE, "# here"), "tests_failed"),
])  # fmt: skip
def test_modes_of_patches_of_an_embedded_task(patch, mode):
    verdict = grading.grade(ROW, patch) if patch else grading.no_patch(ROW)
    assert metrics.failure_mode(ROW, None, patch, verdict) == mode
    submitted = {"exit_status": "submitted", "messages": []}
    assert metrics.failure_mode(ROW, submitted, patch, verdict) == mode
    limit = {"exit_status": "turn_limit", "messages": []}  # the end comes before the patch, but not before success
    assert metrics.failure_mode(ROW, limit, patch, verdict) == (mode and "turn_limit")
    assert mode is None or mode in metrics.FAILURE_MODES
    assert (failures.UNPARSED + GOLD_FILE in verdict["log"]) == ("+def\n" in patch)


@pytest.mark.parametrize("commands, mode", [
    ("abcc", "turn_limit"), ("abccc", "repeated_command"), ("xabab", "repeated_command"), ("xaba", "turn_limit"),
    ("xabcabc", "repeated_command"), ("xabcdabcd", "repeated_command"), ("xabcdabce", "turn_limit"), ("ccca", "turn_limit"),
    ("a--aa", "turn_limit"), ("---", "turn_limit"), ("", "turn_limit"),
])  # fmt: skip
def test_circles_of_commands(commands, mode):
    """A letter is a turn with this command, a dash one without a command."""
    messages = [{"role": "assistant", "command": None if letter == "-" else letter} for letter in commands]
    verdict = grading.no_patch(ROW)
    for end in ("turn_limit", "context_limit", "token_limit", "time_limit"):
        found = metrics.failure_mode(ROW, {"exit_status": end, "messages": messages}, "", verdict)
        assert found == (end if mode == "turn_limit" else mode)
    for end, wanted in (("format_limit", "format_limit"), ("submitted", "no_patch")):
        assert metrics.failure_mode(ROW, {"exit_status": end, "messages": messages}, "", verdict) == wanted


@pytest.mark.parametrize("passed, log, broken", [
    ([], "ERROR tests/test_a.py - ImportError: cannot import name 'x'\n", True),  # pytest -rA, as SWE-bench runs it
    ([], "____ ERROR collecting tests/test_a.py ____\nE   NameError: name 'x' is not defined\n", True),
    ([], "____ ERROR collecting tests/test_a.py ____\n_ _ _ _\nE   ImportError: cannot import name 'x'\n", True),
    ([], "____ ERROR collecting tests/test_b.py ____\nE   ImportError: cannot import name 'x'\n", False),
    ([], "____ test_new ____\nE   ImportError: no x\n____ test_two ____\nE   AssertionError\n", False),  # of a test alone
    ([], "ERROR tests/test_b.py - ImportError: no x\n", False),  # another file, and no test of it passed before
    (["tests/test_a.py::one"], "ERROR tests/test_a.py\n", False),
    ([], "ImportError while loading conftest '/testbed/conftest.py'.\n", True),
    ([], "FAILED tests/test_a.py::one - AssertionError: SyntaxError: expected\n", False),
    ([], "Traceback (most recent call last):\nModuleNotFoundError: No module named 'x'\n", True),
    ([], "killed after 120 s\n", False),
])  # fmt: skip
def test_broken_code_in_a_log_of_the_official_grader(passed, log, broken):
    p2p = {"success": passed, "failure": ["tests/test_a.py::two"]}
    verdict = {"resolved": False, "patch_applied": True, "log": log,
               "tests_status": {"FAIL_TO_PASS": {"success": [], "failure": ["tests/test_b.py::new"]}, "PASS_TO_PASS": p2p}}  # fmt: skip
    assert metrics.failure_mode({"patch": ""}, None, "x", verdict) == ("broken_code" if broken else "tests_failed")


def test_the_files_of_a_patch():
    patch = (
        "diff --git a/a b.py b/a b.py\n--- a/a b.py\n+++ b/a b.py\n@@ -1,2 +1,2 @@\n--- a/not this\n+++ b/nor this\n-x\n"
        "diff --git a/old.py b/new.py\nsimilarity index 100%\nrename from old.py\nrename to new.py\n"
        "diff --git a/made.py b/made.py\nnew file mode 100644\n--- /dev/null\n+++ b/made.py\n@@ -0,0 +1 @@\n+x\n"
    )
    assert failures.files_of(patch) == {"a b.py", "old.py", "new.py", "made.py"}
    assert failures.files_of("--- src/a.py\t2020-01-01\n+++ src/a.py\t2020-01-02\n@@ -1 +1 @@\n-a\n+b\n") == {"src/a.py"}
