"""Grading: gold passes, nothing fails, and no trick that a patch can play gains anything."""

import subprocess
import time

import pytest

from common import grading, official
from common.errors import InputError
from common.grading import DEFAULT_TEST_COMMAND, PYTEST, grade, steers
from common.sandbox import LocalSandbox

WRONG = "def add(a, b):\n    return a - b\n\n\ndef twice(a):\n    return 2 * a\n"
RIGHT = WRONG.replace("a - b", "a + b")
TESTS = """import calc
import pytest


def test_add():
    assert calc.add(1, 2) == 3


def test_twice(number):
    assert calc.twice(number) == 14


@pytest.mark.xfail(reason="not yet")
def test_wish():
    assert calc.twice("a") == 1
"""
NEW_TEST = "\n\n@pytest.mark.parametrize('text', ['a b', 'c'])\ndef test_words(text):\n    assert calc.add(text, '!') == text + '!'\n"
FILES = {
    "calc.py": WRONG, "tests/test_calc.py": TESTS, "tests/test_more.py": "def test_more():\n    from calc import twice\n    assert twice(1) == 2\n",
    "tests/conftest.py": "import pytest\n\n\n@pytest.fixture\ndef number():\n    return 7\n",
    "pyproject.toml": "[project]\nname = 'calc'\n\n[tool.pytest.ini_options]\naddopts = '-ra'\n", "lib/deep.py": "x = 1\n",
}
F2P = ["tests/test_calc.py::test_add", "tests/test_calc.py::test_words[a", "tests/test_calc.py::test_words[c]"]
P2P = ["tests/test_calc.py::test_twice", "tests/test_calc.py::test_wish", "tests/test_more.py::test_more"]


def patch_of(changes: dict[str, str | None], files=FILES) -> str:
    """The patch that makes these changes (None: delete)."""
    with LocalSandbox({"instance_id": "p", "local": {"source": files}}) as box:
        for path, text in changes.items():
            target = box.checkout.tree / path
            target.unlink(missing_ok=True)
            if text is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)
        return box.diff()


GOLD = patch_of({"calc.py": RIGHT})
ROW = {"instance_id": "calc-1", "base_commit": "0" * 40, "patch": GOLD, "FAIL_TO_PASS": F2P, "PASS_TO_PASS": P2P,
       "test_patch": patch_of({"tests/test_calc.py": TESTS + NEW_TEST}), "local": {"source": FILES}}
AUTOLOAD = ROW | {"local": {"source": FILES, "env": {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": ""}}}  # as with a task's own Python


def outcome(result: dict) -> tuple:
    """(resolved, failed F2P, failed P2P, tampered)"""
    status = result["tests_status"]
    return (result["resolved"], len(status["FAIL_TO_PASS"]["failure"]), len(status["PASS_TO_PASS"]["failure"]),
            result["tampered"])


def gains_nothing(changes: dict[str, str | None], tampered: bool = False, row=ROW) -> None:
    """With these changes alone the task is unresolved. tampered: and with the fix besides it is resolved."""
    result = grade(row, patch_of(changes))
    assert result["patch_applied"] and not result["resolved"], result["log"]
    assert len(result["tests_status"]["FAIL_TO_PASS"]["failure"]) == 3, result["log"]
    assert result["tampered"] == tampered, result["log"]
    if tampered:
        assert outcome(grade(row, patch_of({"calc.py": RIGHT} | changes))) == (True, 0, 0, True)


# ---------------------------------------------------------------------------------------------------------------------
# The rule

def test_gold_is_resolved_and_empty_is_not():
    result = grade(ROW, GOLD)
    assert outcome(result) == (True, 0, 0, False), result["log"]
    assert result["patch_applied"] and result["tests_status"]["FAIL_TO_PASS"] == {"success": F2P, "failure": []}
    assert "PASS_TO_PASS tests/test_calc.py::test_wish XFAIL\n" in result["log"] and "6 passed" not in result["log"]
    assert grade(ROW, GOLD) == result  # the log too
    result = grade(ROW, "")
    assert outcome(result) == (False, 3, 0, False) and result["patch_applied"]


def test_a_regression_is_not_resolved():
    result = grade(ROW, patch_of({"calc.py": RIGHT.replace("2 * a", "a")}))
    assert outcome(result) == (False, 0, 2, False)


def test_broken_syntax_fails_everything_that_imports_it():
    assert outcome(grade(ROW, patch_of({"calc.py": RIGHT + "def\n"}))) == (False, 3, 3, False)


def test_a_patch_that_does_not_apply():
    result = grade(ROW, GOLD.replace("a - b", "a * b").replace("def add", "def sum").replace("def twice", "def double"))
    assert outcome(result) == (False, 3, 3, False) and not result["patch_applied"] and "does not apply" in result["log"]
    assert not grade(ROW, "no patch at all\n")["patch_applied"]


def test_a_patch_with_half_a_character_does_not_apply():
    result = grade(ROW, GOLD + "\ud83d")
    assert not result["patch_applied"] and not result["resolved"]


def test_a_patch_with_shifted_context_applies_as_with_swebench():
    """git refuses it; SWE-bench then tries `patch --fuzz=5`, and so do we."""
    patch = "--- a/calc.py\n+++ b/calc.py\n@@ -1,3 +1,3 @@\n def add(first, second):\n-    return a - b\n+    return a + b\n \n"
    result = grade(ROW, patch)
    assert result["resolved"] and result["patch_applied"], result["log"]


def test_a_patch_that_leaves_the_repository_is_refused(tmp_path):
    for path in ("../outside", ".git/hooks/post-checkout", "a/../../outside"):
        patch = f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+x\n"
        assert not grade(ROW, patch)["patch_applied"], path
    link = f"diff --git a/link b/link\nnew file mode 120000\n--- /dev/null\n+++ b/link\n@@ -0,0 +1 @@\n+{tmp_path}\n\\ No newline at end of file\n"
    assert not grade(ROW, link + "--- /dev/null\n+++ b/link/outside\n@@ -0,0 +1 @@\n+x\n")["patch_applied"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_hanging_test_is_unresolved():
    began = time.monotonic()
    result = grade(ROW, patch_of({"calc.py": "import time\n" + RIGHT.replace("return 2", "time.sleep(1000)\n    return 2")}), timeout=4)
    assert not result["resolved"] and "killed after 4 s" in result["log"] and time.monotonic() - began < 30
    assert "tests/test_calc.py::test_twice" in result["tests_status"]["PASS_TO_PASS"]["failure"]


def test_xfail_and_skip():
    """XFAIL counts where the tests say so, not where the program says so; a skip never counts."""
    gains_nothing({"calc.py": "import pytest\n" + WRONG.replace("return a - b", "pytest.xfail('later')")})
    gains_nothing({"calc.py": "import pytest\n" + WRONG.replace("return a - b", "pytest.skip('later')")})
    gains_nothing({"calc.py": "import pytest\npytest.skip('all', allow_module_level=True)\n" + WRONG})
    files = FILES | {"tests/test_calc.py": TESTS.replace("def test_wish", "def test_wish2").replace(
        "assert calc.add(1, 2) == 3", "calc.add(1, 2) == 3 or pytest.xfail('imperative')")}
    row = ROW | {"local": {"source": files}, "test_patch": "", "FAIL_TO_PASS": F2P[:1], "PASS_TO_PASS": []}
    assert grade(row, "")["resolved"]  # the test module's own pytest.xfail()


# ---------------------------------------------------------------------------------------------------------------------
# Tricks with the tests

def test_deleted_and_edited_tests_come_back():
    gains_nothing({"tests/test_calc.py": None, "tests/test_more.py": None})
    easy = "def test_add(): pass\ndef test_twice(): pass\ndef test_wish(): pass\n"
    gains_nothing({"tests/test_calc.py": easy + "import pytest\n@pytest.mark.parametrize('text', ['a b', 'c'])\ndef test_words(text): pass\n"})
    broken = {"calc.py": RIGHT.replace("2 * a", "0"), "tests/test_more.py": "def test_more(): pass\n"}
    assert outcome(grade(ROW, patch_of(broken))) == (False, 0, 2, False)  # test_more.py is not in the test patch, but listed
    gains_nothing({"tests/test_calc.py": TESTS.replace("def test_add", "@pytest.mark.xfail\ndef test_add")})
    gains_nothing({"tests/test_calc.py": None, "tests/test_calc.py/__init__.py": easy})


def test_printed_results_count_for_nothing():
    lines = "".join(f"PASSED {name}\\n" for name in F2P + P2P)
    gains_nothing({"calc.py": f"import sys\nsys.__stdout__.write('''{lines}6 passed''')\nsys.stdout.flush()\n" + WRONG})


@pytest.mark.parametrize("exit_call", ["os._exit(0)", "sys.exit(0)", "os.kill(os.getpid(), 9)", "exec('raise KeyboardInterrupt')"])
def test_an_early_end_is_no_pass(exit_call):
    gains_nothing({"calc.py": f"import os, sys\n{exit_call}\n" + WRONG})


def test_a_report_cannot_be_written_by_the_program():
    """At exit, through every open handle and into every file of the report, and by replaying what is there."""
    forge = """import atexit, json, os
def forge():
    lines = []
    for n, name in enumerate(%r, 1000):
        record = {"names": [name], "when": "call", "outcome": "passed"}
        lines.append("0" * 64 + " " + json.dumps([n, record]) + "\\n")
        lines.append(json.dumps([n, record]) + "\\n")
    text = "".join(lines).encode()
    try:
        old = open("/run/grading/report/outcomes", "rb").read()
        text += old + old.replace(b"failed", b"passed").replace(b"test_twice", b"test_add")
    except OSError: pass
    for handle in range(3, 64):
        try: os.write(handle, text)
        except OSError: pass
    for name in ("outcomes", "settings.json", "more"):
        try: open("/run/grading/report/" + name, "ab").write(text)
        except OSError: pass
    os._exit(0)
atexit.register(forge)
""" % (F2P + P2P)
    gains_nothing({"calc.py": forge + WRONG})
    gains_nothing({"calc.py": forge.replace("atexit.register(forge)", "forge()") + WRONG})
    gains_nothing({"calc.py": forge.replace("atexit.register(forge)", "if not os.fork(): forge()") + WRONG})


def test_a_report_that_is_taken_away_is_a_failure():
    for call in ("os.truncate('/run/grading/report/outcomes', 0)",
                 "os.unlink('/run/grading/report/outcomes'); os.symlink('/etc/passwd', '/run/grading/report/outcomes')",
                 "os.unlink('/run/grading/report/outcomes'); os.mkfifo('/run/grading/report/outcomes')",
                 "os.rmdir('/run/grading/report')"):
        result = grade(ROW, patch_of({"calc.py": f"import os\ntry: {call}\nexcept OSError: pass\n" + WRONG}))
        assert not result["resolved"], call


def test_the_secret_is_nowhere_to_be_read():
    """Not in the environment, the command line, a file or an open handle of the test process or its parents."""
    spy = """import glob, os, sys
seen = [os.environ.get("PYTHONPATH", "")]
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline") + glob.glob("/run/grading/**", recursive=True):
    try: seen.append(open(path, errors="replace").read())
    except OSError: pass
for handle in range(3, 64):
    try: seen.append(os.pread(handle, 100000, 0).decode(errors="replace"))
    except OSError: pass
import re
raise OSError("SPY %d %s" % (len(seen), re.findall(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", "\\n".join(seen))))
"""
    log = grade(ROW, patch_of({"calc.py": spy + WRONG}))["log"]
    line = next(line for line in log.splitlines() if line.startswith("E   OSError: SPY"))
    assert line.endswith("[]") and int(line.split()[3]) > 4, line


# ---------------------------------------------------------------------------------------------------------------------
# Files that steer

PASS_ALL = """import pytest
@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    report.outcome, report.longrepr = "passed", None
def pytest_collection_modifyitems(items):
    for item in items: item.obj = lambda **_: None
"""


def test_conftest():
    gains_nothing({"tests/conftest.py": FILES["tests/conftest.py"] + PASS_ALL}, tampered=True)
    gains_nothing({"conftest.py": PASS_ALL}, tampered=True)
    gains_nothing({"tests/conftest.py": None}, tampered=True)


@pytest.mark.parametrize("path,text", [
    ("pytest.ini", "[pytest]\naddopts = --collect-only\n"), (".pytest.ini", "[pytest]\naddopts = -p evil\n"),
    ("tox.ini", "[pytest]\npython_functions = nothing\n"), ("tox.ini", "; x\r[pytest]\raddopts = --co\r"),
    ("tox.ini", "[tox]\n[zzz\n"), ("tox.ini", "; x\f[pytest]\faddopts = --co\f"), ("tests/pytest.ini", "[pytest]\naddopts = --co\n"),
    ("setup.cfg", "[metadata]\nname = x\n[tool:pytest]\naddopts = --runxfail --deselect tests/test_calc.py\n"),
    ("pyproject.toml", FILES["pyproject.toml"].replace("-ra", "-ra -p evil --setup-only")),
])
def test_configuration(path, text):
    gains_nothing({path: text, "evil.py": PASS_ALL}, tampered=True)


@pytest.mark.parametrize("text", ["tool = 1\n", "tool = [1]\n", "x = " + "[" * 5000 + "\n", "[tool]\npytest = 3\n"])
def test_configuration_that_is_none(text):
    """An odd file is the patch's own trouble, and never the end of a stage."""
    assert outcome(grade(ROW, patch_of({"calc.py": RIGHT, "pyproject.toml": text})))[:3] == (True, 0, 0)


def test_a_parser_that_cannot_read_what_is_printed():
    row = ROW | {"local": {"source": FILES, "test_cmd": "python -c 'print(\"FAIL:\")'", "log_parser": "parse_log_django"}}
    result = grade(row, GOLD)
    assert not result["resolved"] and "parse_log_django cannot read this: IndexError" in result["log"]


def test_what_tests_write_beside_their_report_counts(monkeypatch):
    monkeypatch.setattr(grading, "LocalSandbox", lambda row, **more: LocalSandbox(row, disk=30 << 20, **more))
    fill = "for n in range(100):\n    open(f'/run/grading/report/{n}', 'wb').write(bytes(10 << 20)); __import__('time').sleep(0.02)\n"
    result = grade(ROW, patch_of({"calc.py": fill + RIGHT}))
    assert not result["resolved"] and "killed: too much written" in result["log"]


def test_the_rest_of_a_configuration_file_is_the_patchs_own():
    changes = {"pyproject.toml": FILES["pyproject.toml"].replace("'calc'", "'calc'\nversion = '2'"), "setup.cfg": "[metadata]\nname = x\n",
               "tox.ini": "[tox]\nenvlist = py\n"}
    assert outcome(grade(ROW, patch_of({"calc.py": RIGHT} | changes))) == (True, 0, 0, False)


@pytest.mark.parametrize("changes", [
    {"sitecustomize.py": "import os; os.environ['X'] = '1'\n" + PASS_ALL}, {"usercustomize/__init__.py": "1\n"},
    {"evil.pth": "import os\n"}, {"pytest.py": "print('PASSED')\n"}, {"_pytest/__init__.py": "raise SystemExit(0)\n"},
    {"evil-1.dist-info/entry_points.txt": "[pytest11]\nevil = evil\n", "evil-1.dist-info/METADATA": "Name: evil\nVersion: 1\n", "evil.py": PASS_ALL},
], ids=lambda changes: next(iter(changes)))
def test_planted_modules(changes):
    gains_nothing(changes, tampered=True, row=AUTOLOAD if "evil.py" in changes else ROW)


def test_a_shadowed_standard_library_does_not_reach_the_reporter():
    """Modules of pytest's and of the reporter's own are loaded before the repository is on the path."""
    bad = "raise SystemExit(0)\n"
    changes = {"json.py": bad, "hmac.py": bad, "random.py": bad, "hypothesis.py": bad, "anyio/__init__.py": bad}
    gains_nothing(changes, row=AUTOLOAD)


def test_compiled_tests_are_not_planted():
    """pytest would load a cached test module whose recorded size and time match the source."""
    import importlib.util
    import _pytest.assertion.rewrite as rewrite
    tag = rewrite.PYC_TAIL
    with LocalSandbox({"instance_id": "p", "local": {"source": FILES}}) as box:
        sh = box.run("mkdir -p tests/__pycache__ && cp tests/test_more.py tests/__pycache__/test_calc" + tag)
        assert sh.exit_code == 0 and importlib.util
        patch = box.diff()
    result = grade(ROW, patch)
    assert outcome(result) == (False, 3, 0, True)


def test_a_script_named_in_the_test_command():
    files = FILES | {"run_tests.py": "import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))\n"}
    row = ROW | {"local": {"source": files, "test_cmd": "python run_tests.py -rA", "log_parser": "parse_log_pytest"},
                 "FAIL_TO_PASS": F2P[:1], "PASS_TO_PASS": P2P[:1]}
    assert outcome(grade(row, GOLD)) == (True, 0, 0, False)
    lines = "".join(f"print('PASSED {name}')\n" for name in F2P + P2P)
    assert outcome(grade(row, patch_of({"run_tests.py": lines}, files))) == (False, 1, 0, True)


def test_what_steers():
    for path in ("conftest.py", "a/conftest.py", "a/b.pth", "x/__pycache__/y.pyc", "src/pytest/__init__.py", "pluggy.py",
                 "pytest.cpython-311-x86_64-linux-gnu.so", "sitecustomize/__init__.py", "x.egg-info/entry_points.txt"):
        assert steers(path, {"", "src/"}, {}), path
    for path in ("calc.py", "lib/pytest/x.py", "src/py_things.py", "conftest.txt", "docs/pytest.rst.txt"):
        assert not steers(path, {"", "src/"}, {}), path
    assert not steers("src/_pytest/python.py", {"", "src/"}, {"src/_pytest/nodes.py": ("100644", "0")})  # pytest's own repository


def test_the_gold_patchs_own_steering_files_are_used():
    """A gold patch that changes conftest.py: everybody is tested with that."""
    conftest = FILES["tests/conftest.py"] + "\n\n@pytest.fixture\ndef eight():\n    return 8\n"
    row = ROW | {"patch": patch_of({"calc.py": RIGHT, "tests/conftest.py": conftest}), "FAIL_TO_PASS": ["tests/test_new.py::test_eight"],
                 "test_patch": patch_of({"tests/test_new.py": "import calc\ndef test_eight(eight):\n    assert calc.add(1, 7) == eight\n"}),
                 "PASS_TO_PASS": P2P[:1]}
    assert outcome(grade(row, row["patch"])) == (True, 0, 0, False)
    assert outcome(grade(row, GOLD)) == (True, 0, 0, False)
    assert outcome(grade(row, patch_of({"calc.py": RIGHT, "tests/conftest.py": PASS_ALL}))) == (True, 0, 0, True)
    assert outcome(grade(row, "")) == (False, 1, 0, False)


# ---------------------------------------------------------------------------------------------------------------------
# Other tasks

def test_python_path_source_layout_and_setup():
    """src/ on PYTHONPATH: the repository's module is found, by the tests' subprocesses too, and shadows nothing."""
    tests = ("import subprocess, sys\nimport calc\ndef test_add():\n    assert calc.add(1, 2) == 3\n"
             "def test_sub():\n    assert subprocess.check_output([sys.executable, '-c', 'import calc; print(calc.add(1, 2))']) == b'3\\n'\n")
    files = {"src/calc.py": WRONG, "tests/test_calc.py": tests}
    row = {"instance_id": "src-1", "patch": "", "test_patch": "", "FAIL_TO_PASS": ["tests/test_calc.py::test_add", "tests/test_calc.py::test_sub"],
           "PASS_TO_PASS": [], "local": {"source": files, "env": {"PYTHONPATH": "src"}, "test_cmd": "pytest -q", "setup": ["echo 1 > made"]}}
    assert grade(row, patch_of({"src/calc.py": RIGHT}, files))["resolved"]
    result = grade(row, patch_of({"src/sitecustomize.py": "print(1)\n", "src/json.py": "raise SystemExit(0)\n"}, files))
    assert not result["resolved"] and result["tampered"] and len(result["tests_status"]["FAIL_TO_PASS"]["failure"]) == 2


def test_many_ids_and_ids_that_are_gone():
    tests = "import calc, pytest\n@pytest.mark.parametrize('n', range(4000))\ndef test_twice(n):\n    assert calc.twice(n) == 2 * n\n"
    files = {"calc.py": WRONG, "test_calc.py": tests}
    names = [f"test_calc.py::test_twice[{n}]" for n in range(4000)]
    row = {"instance_id": "many", "FAIL_TO_PASS": [], "PASS_TO_PASS": names, "local": {"source": files}}
    assert grade(row, "")["resolved"]
    row |= {"PASS_TO_PASS": [names[0], "test_calc.py::test_gone", "gone.py::test_x"]}
    result = grade(row, "")
    assert not result["resolved"] and result["tests_status"]["PASS_TO_PASS"]["success"] == names[:1]


def test_rows_that_cannot_be_graded():
    with pytest.raises(InputError, match="calc-1: its own patch or test_patch does not apply"):
        grade(ROW | {"test_patch": ROW["test_patch"].replace("def test_wish", "def test_hope")}, "")
    with pytest.raises(InputError, match="does not run pytest.*log_parser"):
        grade(ROW | {"local": {"source": FILES, "test_cmd": "make check"}}, "")
    with pytest.raises(InputError, match="unknown log_parser 'nope'; swebench has "):
        grade(ROW | {"local": {"source": FILES, "log_parser": "nope"}}, "")
    with pytest.raises(InputError, match="does not run pytest"):  # before anything is rolled out
        official.choose([ROW | {"local": {"source": FILES, "test_cmd": "make check"}}], "auto")
    with pytest.raises(InputError, match="FAIL_TO_PASS is not a list"):
        grade(ROW | {"FAIL_TO_PASS": "nonsense"}, "")
    assert grade(ROW | {"FAIL_TO_PASS": '["tests/test_calc.py::test_add"]'}, GOLD)["resolved"]  # as in the data sets
    assert not grade(ROW | {"FAIL_TO_PASS": [], "PASS_TO_PASS": []}, GOLD)["resolved"]


def test_how_pytest_is_found_in_a_command():
    found = {command: (match := PYTEST.search(command)) and (command[match.start():match.end()], match["python"]) for command in (
        DEFAULT_TEST_COMMAND, "pytest -rA", "cd sub && python3 -m pytest", "/venv/bin/python -X dev -m pytest -q", "./pytest.sh",
        "tox -e pytest-x", "bin/test", "venv/bin/pytest -q", "X=1 py.test")}
    assert list(found.values()) == [("python -m pytest", "python"), ("pytest", None), ("python3 -m pytest", "python3"),
                                    ("/venv/bin/python -X dev -m pytest", "/venv/bin/python -X dev"), None, None, None,
                                    ("venv/bin/pytest", None), ("py.test", None)]
    assert subprocess.run(["true"]).returncode == 0
