"""What plain rows of SWE-bench and SWE-Gym are completed with, run for real where that can be done without an image."""

import os
import subprocess
import sys

import pytest

from common import repositories

PATCH = """\
diff --git a/tests/test_add.py b/tests/test_add.py
--- a/tests/test_add.py
+++ b/tests/test_add.py
@@ -3,0 +4,2 @@ def test_old():
+def test_negative():
+    assert add(-1, -1) == -2
diff --git a/tests/test_new.py b/tests/test_new.py
new file mode 100644
--- /dev/null
+++ b/tests/test_new.py
@@ -0,0 +1,3 @@
+from calc import add
+def test_new():
+    assert add(2, 3) == 5
diff --git a/tests/numbers.json b/tests/numbers.json
new file mode 100644
--- /dev/null
+++ b/tests/numbers.json
@@ -0,0 +1 @@
+[1, 2]
"""
GOLDEN = """\
#!/bin/bash
set -uxo pipefail
exec 2>&1
cd /testbed || exit 1
set +ux
if [ -f /opt/miniconda3/bin/activate ]; then . /opt/miniconda3/bin/activate; conda activate testbed; fi
set -x
git config --global --add safe.directory /testbed
python -m pip install -e .
rm -rf -- tests/test_add.py tests/test_new.py tests/numbers.json
git checkout BASE -- tests/test_add.py || exit 1
git apply -v - <<'END_OF_TEST_PATCH' || exit 1
{patch}END_OF_TEST_PATCH
: '>>>>> Start Test Output'
pytest -rA tests/test_add.py tests/test_new.py
: '>>>>> End Test Output'
rm -rf -- tests/test_add.py tests/test_new.py tests/numbers.json
git checkout BASE -- tests/test_add.py || exit 1
"""


def row(repo="pallets/flask", **more):
    return {
        "instance_id": repo.replace("/", "__") + "-1", "repo": repo, "base_commit": "BASE", "problem_statement": "p",
        "version": "2.3", "patch": "", "test_patch": PATCH,
        "FAIL_TO_PASS": ["tests/test_add.py::test_negative", "tests/test_new.py::test_new"],
        "PASS_TO_PASS": ["tests/test_add.py::test_old"], **more,
    }  # fmt: skip


def test_every_repository_makes_a_row_that_swebench_takes():
    from swebench.harness.constants import EvalType
    from swebench.harness.log_parsers import PARSER_REGISTRY
    from swebench.harness.utils import make_test_spec

    assert len(repositories.SWE_BENCH) == 12 and len(repositories.SWE_GYM) == 11
    for repo in repositories.TABLE:
        spec = make_test_spec(repositories.complete(row(repo)))
        assert spec.log_parser in PARSER_REGISTRY and EvalType(spec.eval_type) == EvalType.PASS_AND_FAIL
        script = spec.eval_script
        assert script.count("Start Test Output") == script.count("End Test Output") == 1
        before_end = script.split("\n: '>>>>> End")[0].splitlines()  # swebench asks for the exit code of the tests
        assert before_end[-1] == "SWEBENCH_TEST_EXIT_CODE=$?" and before_end[-2].startswith(repositories.repository(
            row(repo)).test)
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    "repo, name, image",
    [
        ("scikit-learn/scikit-learn", "scikit-learn__scikit-learn-10297",
         "swebench/sweb.eval.x86_64.scikit-learn_1776_scikit-learn-10297:latest"),
        ("Project-MONAI/MONAI", "Project-MONAI__MONAI-1121",
         "xingyaoww/sweb.eval.x86_64.project-monai_s_monai-1121:latest"),
    ],
)  # fmt: skip
def test_images(repo, name, image):
    assert repositories.complete(row(repo, instance_id=name))["image"] == image


def test_what_a_row_says_is_kept():
    full = row(image="mine", log_parser="parse_log_pytest", eval_type="fail_only", eval_script="true")
    for as_it_is in (full, row("some/other"), row(local={"source": "."})):
        assert repositories.complete(as_it_is) is as_it_is
    half = repositories.complete(row(image="mine", eval_script=None))
    assert half["image"] == "mine" and half["eval_script"] == GOLDEN.format(patch=PATCH)


def test_the_script_as_it_is_written():
    assert repositories.eval_script(row()) == GOLDEN.format(patch=PATCH)
    assert repositories.eval_script(row(test_patch=PATCH.rstrip("\n"))) == GOLDEN.format(patch=PATCH)


@pytest.mark.parametrize(
    "repo, version, command",
    [
        ("django/django", "1.9", "./tests/runtests.py --verbosity 2"),
        ("django/django", "3.2", "./tests/runtests.py --verbosity 2 --settings=test_sqlite --parallel 1"),
        ("astropy/astropy", "1.3", "pytest -rA -vv -o console_output_style=classic --tb=no"),
        ("astropy/astropy", "v5.3", "pytest -rA"),
        ("astropy/astropy", None, "pytest -rA"),
        ("iterative/dvc", "3.15", "pytest -rA"),
    ],
)
def test_commands_by_version(repo, version, command):
    names = "test_add test_new" if repo == "django/django" else "tests/test_add.py tests/test_new.py"
    assert f"\n{command} {names}\n" in repositories.eval_script(row(repo, version=version))


def test_old_versions_install_otherwise():
    install = lambda repo, version: repositories.repository(row(repo, version=version)).install  # noqa: E731
    assert install("django/django", "2.2") == "python setup.py install"
    assert install("django/django", "3.0") == "python -m pip install -e ."
    assert install("iterative/dvc", "2.58").endswith(" 'numpy<=1.20' 'pytest<8'")
    assert "numpy" not in install("iterative/dvc", "3.10") and "numpy" not in install("pandas-dev/pandas", "2.2")
    assert "locale-gen" in repositories.eval_script(row("django/django", version="2.2"))
    assert "locale-gen" not in repositories.eval_script(row("django/django", version="4.0"))


def test_arguments_of_the_test_command():
    of = lambda patch, repo="pallets/flask": repositories.test_arguments(row(repo, test_patch=patch))  # noqa: E731
    new = "diff --git a/{0} b/{0}\nnew file mode 100644\n--- /dev/null\n+++ b/{0}\n@@ -0,0 +1 @@\n+{1}\n"
    gone = "diff --git a/tests/gone.py b/tests/gone.py\ndeleted file mode 100644\n--- a/tests/gone.py\n+++ /dev/null\n"
    assert of(new.format("tests/a b.py", "x") + gone) == "'tests/a b.py'"
    listed = "tests/test_add.py tests/test_new.py"  # the files of the listed tests
    assert of(new.format("tests/data.csv", "x")) == listed
    assert of(new.format("tests/admin_views/tests.py", "x"), "django/django") == "admin_views.tests"
    cases = new.format("test-data/unit/check-a.test", "[case testOne]\n+[case testTwo-xfail]\n+[case testOne]")
    assert of(cases, "python/mypy") == "-k 'testOne or testTwo-xfail'"
    assert of(new.format("mypy/test/teststubgen.py", "x"), "python/mypy") == listed


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_paths_of_a_patch_that_git_wrote(tmp_path):
    """Every kind of change, names that git quotes or ends with a tab, and lines of a hunk that look like a header."""
    files = ("changed", "gone", "moved", "moved and changed", "mode", "é", "a/in a")
    git(tmp_path, "init", "-q")
    (tmp_path / "a").mkdir()
    for name in files:
        (tmp_path / name).write_text(f"{name}\n-- a/no\n" + "same\n" * 9)
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "c")
    for name in ("changed", "é", "a/in a"):
        (tmp_path / name).write_text("++ b/no\n")
    (tmp_path / "gone").unlink()
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    (tmp_path / "moved and changed").rename(tmp_path / "other place")
    with open(tmp_path / "other place", "a") as file:
        file.write("more\n")
    (tmp_path / "mode").chmod(0o755)
    (tmp_path / "empty").touch()
    (tmp_path / 'new "ü"').write_text("x\n")
    git(tmp_path, "add", "-A")
    old, new = repositories.changed_files(git(tmp_path, "diff", "--cached", "-M"))
    assert set(old) == set(files)
    assert set(new) == {"changed", "mode", "é", "a/in a", "elsewhere", "other place", "empty", 'new "ü"'}


# ------------------------------------------------------------------------------------------------- the script at work


@pytest.fixture
def testbed(tmp_path):
    """A repository as in an image of SWE-bench: base_commit, and one commit of the set-up on top."""
    home = tmp_path / "testbed"
    (home / "tests").mkdir(parents=True)
    (home / "calc.py").write_text("def add(a, b):\n    return abs(a) + b\n")
    (home / "tests" / "test_add.py").write_text("from calc import add\ndef test_old():\n    assert add(1, 1) == 2\n")
    git(home, "init", "-q")
    git(home, "add", "-A")
    git(home, "commit", "-qm", "base")
    base = git(home, "rev-parse", "HEAD").strip()
    git(home, "commit", "-qm", "set up", "--allow-empty")
    return home, base


GOLD = """\
diff --git a/calc.py b/calc.py
--- a/calc.py
+++ b/calc.py
@@ -2 +2 @@
-    return abs(a) + b
+    return a + b
"""
CHEAT = """\
diff --git a/tests/test_add.py b/tests/test_add.py
--- a/tests/test_add.py
+++ b/tests/test_add.py
@@ -3 +3,3 @@
-    assert add(1, 1) == 2
+    pass
+def test_negative():
+    pass
diff --git a/tests/test_new.py b/tests/test_new.py
new file mode 100644
--- /dev/null
+++ b/tests/test_new.py
@@ -0,0 +1,2 @@
+def test_new():
+    pass
"""


def official_report(testbed, tmp_path, patch, **fields):
    """What swebench's harness does in a container: apply the patch, run the script, grade its log.

    The environment `testbed` of conda is what PATH names, and its scripts use a variable that is not set.
    """
    from swebench.harness.grading import get_eval_report
    from swebench.harness.utils import make_test_spec

    home, base = testbed
    spec = make_test_spec(repositories.complete(row(base_commit=base, **fields)))
    if patch:
        (tmp_path / "patch.diff").write_text(patch)
        git(home, "apply", "--verbose", tmp_path / "patch.diff")
    conda = tmp_path / "activate"
    conda.write_text(f'conda() {{ export PATH={os.path.dirname(sys.executable)}:$PATH; echo $NOT_SET "$@"; }}\n')
    script = spec.eval_script.replace("/testbed", str(home)).replace("python -m pip install -e .", "echo installed")
    script = script.replace("/opt/miniconda3/bin/activate", str(conda))
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(home),
           "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    log = tmp_path / "test_output.txt"
    log.write_text(done.stdout)
    prediction = {"instance_id": spec.instance_id, "model_name_or_path": "m", "model_patch": patch}
    return get_eval_report(spec, prediction, str(log), include_tests_status=True)[spec.instance_id], done.stdout


def test_gold_is_resolved_and_the_test_files_are_put_back(testbed, tmp_path):
    report, log = official_report(testbed, tmp_path, GOLD)
    assert report["resolved"], log
    assert "activate testbed" in log and ">>>>> Test Exit Code: 0" in log
    assert git(testbed[0], "status", "--short", "--", "tests", "calc.py") == " M calc.py\n"


@pytest.mark.parametrize("patch", ["", CHEAT], ids=["empty", "rewrites the tests"])
def test_without_the_repair_it_is_not(testbed, tmp_path, patch):
    report, log = official_report(testbed, tmp_path, patch)
    assert report["patch_successfully_applied"] and not report["resolved"], log
    assert report["tests_status"]["FAIL_TO_PASS"] == {
        "success": ["tests/test_new.py::test_new"], "failure": ["tests/test_add.py::test_negative"]}
    assert report["tests_status"]["PASS_TO_PASS"]["success"] == ["tests/test_add.py::test_old"]


def test_a_repair_that_left_its_own_tests_there_is_resolved(testbed, tmp_path):
    """A file at the path of a new test, and a changed one, make `git apply` fail if they are left there."""
    (testbed[0] / "tests" / "numbers.json").mkdir()
    report, log = official_report(testbed, tmp_path, GOLD + CHEAT)
    assert report["resolved"], log


def test_a_test_patch_that_does_not_apply_is_no_run(testbed, tmp_path):
    broken = PATCH.replace("@@ -3,0 +4,2 @@", "@@ -30,2 +31,4 @@")
    report, log = official_report(testbed, tmp_path, GOLD, test_patch=broken)
    assert "Start Test Output" not in log
    assert not report["resolved"] and not report["patch_successfully_applied"]
