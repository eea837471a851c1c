"""Runs pytest inside the sandbox for common/grading.py and reports outcomes where printed text cannot reach.

Not imported but mounted into the sandbox, and run there by the task's interpreter in the place of `python -m pytest`:

    python /run/grading/pytest_report.py CWD_FIRST PYTEST_ARGUMENTS...

It starts with nothing of the repository on sys.path, so no planted pytest.py, random.py or plugin is imported in the
place of the real one; the repository's directories go to the front, where they belong, once pytest and its plugins are
loaded. It reads a secret, deletes the file, and signs every outcome with it. The program under test runs in the same
process: whoever goes through this process's memory (frames, the garbage collector, pytest's classes) can forge
outcomes. Stopping that is out of scope. Python 3.6 or later; nothing but the standard library and pytest.
"""

import hashlib
import hmac
import json
import os
import sys

FOLDER = "/run/grading/report"


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    with open(FOLDER + "/settings.json") as file:
        settings = json.load(file)
    os.unlink(FOLDER + "/settings.json")
    paths = [os.path.abspath(path) for path in settings["pythonpath"]]
    if sys.argv[1] == "1" and not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):
        paths.insert(0, os.getcwd())  # what `python -m` does
    if settings["environment"] is not None:
        os.environ["PYTHONPATH"] = settings["environment"]  # for the tests' own subprocesses
    if settings["tests_pytest"]:  # the repository is pytest itself
        sys.path[:0] = paths
        paths = []
    sys.path.extend(paths)

    import pytest

    wanted = set(settings["tests"])
    report = os.open(FOLDER + "/outcomes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # not inherited by children
    secret, process, written = settings["secret"].encode(), os.getpid(), [0]

    def write(record):
        if os.getpid() == process:  # not in a fork
            written[0] += 1
            text = json.dumps([written[0], record])
            sign = hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()
            os.write(report, (sign + " " + text + "\n").encode())

    class Reporter(object):
        @pytest.hookimpl(tryfirst=True)
        def pytest_load_initial_conftests(self):
            """Plugins are loaded: now the repository comes first."""
            for path in paths:
                sys.path.remove(path)
            sys.path[:0] = paths

        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, config, items):
            """Run the listed tests alone. Their files were given, because one id that is gone would stop pytest."""
            keep = [item for item in items if names(config.cwd_relative_nodeid(item.nodeid)) & wanted]
            if len(keep) < len(items):
                config.hook.pytest_deselected(items=[item for item in items if item not in set(keep)])
                items[:] = keep

        @pytest.hookimpl(tryfirst=True)
        def pytest_configure(self, config):
            self.config = config

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_logreport(self, report):
            name = self.config.cwd_relative_nodeid(report.nodeid)
            outcome = report.outcome
            if hasattr(report, "wasxfail"):
                expected = "xfail" in report.keywords or called_in_test(report)
                outcome = "xpassed" if outcome == "passed" else "xfailed" if expected else "skipped"
            write({"names": sorted(names(name)), "when": report.when, "outcome": outcome})

    code = pytest.main(sys.argv[2:], plugins=[Reporter()])
    sys.exit(int(code))


def names(name):
    """A test's id, and its first word: SWE-bench's parsers cut ids at white space, and so do its lists."""
    return {name, (name.split() or [""])[0]}


def called_in_test(report):
    """Whether pytest.xfail() was called by the test module itself, not by the program that it tests."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash is not None and os.path.abspath(crash.path) == os.path.abspath(report.nodeid.split("::")[0])


if __name__ == "__main__":
    main()
