"""Runs the real pytest in each directory given and prints {directory: {test id: outcome}} as JSON.

One process for all of them, because starting pytest costs more than running nine tests. Used by test_toy_tasks.py.
"""

import contextlib
import io
import json
import os
import sys

import pytest


class Recorder:
    def __init__(self):
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.outcomes[report.nodeid] = report.outcome


found = {}
for folder in sys.argv[1:]:
    os.chdir(folder)
    recorder = Recorder()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([], plugins=[recorder])
    found[folder] = recorder.outcomes
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if not entry.startswith(folder)]
print(json.dumps(found))
