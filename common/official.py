"""Grades patches with SWE-bench's official harness (swebench 5), unchanged, in Docker containers.

The harness keys everything by instance id and re-uses a report of the same run id even if the patch is another one. So
every patch has a process, a directory and a run id of its own: swebench.harness.run_evaluation.main is called there on
a data set of one row and one prediction. Several patches of one task do not meet, a patch that the machine failed is
tried again alone, and the run id is a hash of directory, row, patch and time limit: another patch is graded, the same
one, after an interruption, has its report read. The directory (OUT/swebench/NAME) keeps what went in (dataset.jsonl,
predictions.jsonl), what the harness printed (harness.log) and its own logs/.

What counts as what. The harness itself says "unresolved" or "error"; we look at the files it left:
* a report: its verdict;
* no report, and its log says that the patch did not apply or that the tests ran out of time: the task is unresolved,
  and so it is where the harness trips over what the patch or the tests did (text that is not UTF-8, a container without
  git any more; in an image without the program `kill` that is also how the end of the time looks);
* no report for any other reason (no image, an error or a timeout of the engine): InfraError, no result.
A busy engine can lose the first lines that a command in a container prints (seen with Docker 20.10), and the harness
then finds no outcomes and says "unresolved". So where a log without outcomes lacks a mark that every eval_script prints,
the patch is graded again, twice at most; then the verdict stands, for a patch can also kill the script.

The harness also guesses from the tests' output that the machine was short of memory or network. A patched program can
print such words, so the task stays unresolved as in the official count; the guess is noted as suspected_infra.

Known weaknesses, which are the official number's own: outcomes are read from what the tests print, so a patched program
can print results (it must also end the run with exit code 0); a skipped PASS_TO_PASS test counts as passed; conftest.py
and tests that the test patch does not touch are the patch's. tests/test_official.py shows each. Containers run as root
with network and without limits, as the harness starts them: grade patches of models that you do not trust on a machine
that you can lose. A patch that kills its own container ends as an InfraError, which --max-infra bounds and `rate_of_all`
counts. `tampered` is always false here.
"""

import builtins
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from importlib import metadata
from pathlib import Path

from common import docker_engine, grading, run
from common.errors import InfraError, InputError
from common.repositories import ADDED

TIMEOUT = 1800.0  # seconds for the tests of one patch, the harness's own default
TRIES = 3  # for a log that is not whole
MODEL = "model"  # the harness files a prediction under the model's name; it decides nothing else
STAMP = r"^\d{4}-\d\d-\d\d [\d:,]+ - [A-Z]+ - "  # of the harness's log; what a patch or a test printed cannot begin so
NOT_APPLIED = re.compile(STAMP + r">>>>> Patch Apply Failed", re.M)
WHY = re.compile(STAMP + r"Error (?:creating container for|in evaluating model for) [^\n]*?: ([^\n]+)", re.M)
RAISED = re.compile(r"^([A-Za-z_][\w.]*)(?:: .*)?$", re.M)


def choose(rows: list[dict], grader: str) -> dict[str, str]:
    """instance_id -> "local" or "swebench". grader: auto (local where a row has `local`), local or swebench.

    Raises InputError for a row that names no tests, and for one that the official harness is to grade and cannot: it
    names the id and the fields.
    """
    def one(row: dict) -> str:
        return "local" if grader == "local" or (grader == "auto" and row.get("local")) else "swebench"

    for row in rows:
        if not row["FAIL_TO_PASS"] and not row["PASS_TO_PASS"]:
            raise InputError(f"{row['instance_id']}: FAIL_TO_PASS and PASS_TO_PASS name no test, so there is nothing to "
                             "grade a patch by; 01_collect.py --mix student makes one without grading it")
    chosen = {row["instance_id"]: one(row) for row in rows}
    for row in rows:
        if chosen[row["instance_id"]] == "local" and row.get("local"):
            grading.check_command(row)
    official = [row for row in rows if chosen[row["instance_id"]] == "swebench"]
    for row in official:
        missing = [field for field in ADDED if not isinstance(row.get(field), str) or not row[field].strip()]
        if missing:
            raise InputError(f"{row['instance_id']}: no {', '.join(missing)}, which the official harness needs"
                             + ("" if row.get("local") else ", and no `local` to grade it here"))
    if official:
        from swebench.harness import constants, log_parsers  # late: it takes seconds
        for row in official:
            kinds = [kind.value for kind in constants.EvalType]
            for field, names in (("log_parser", log_parsers.PARSER_REGISTRY), ("eval_type", kinds)):
                if row[field] not in names:
                    known = ", ".join(sorted(names))
                    raise InputError(f"{row['instance_id']}: {field} {row[field]!r} is none of {known}")
            for mark in (constants.START_TEST_OUTPUT, constants.END_TEST_OUTPUT):
                if mark not in row["eval_script"]:
                    raise InputError(f"{row['instance_id']}: eval_script never prints {mark!r}, so no patch could pass")
    return chosen


def version() -> str:
    """Of swebench, without importing it."""
    return metadata.version("swebench")


def grade(row: dict, patch: str, home: Path, *, timeout: float = TIMEOUT) -> dict:
    """Grade one patch in the directory `home`, which belongs to it. timeout: seconds for the tests.

    Returns what grading.grade returns, and `end`: graded, timeout, patch_not_applied or harness_error. If the report of
    exactly this work is there, nothing is run. Raises InfraError if there is no verdict for the machine's sake.
    """
    instance, timeout = row["instance_id"], math.ceil(timeout)
    data = {name: value for name, value in row.items() if name != "local"} | {"version": row.get("version") or ""}
    run_id = "swe-dagger-" + run.hash_json([str(home.resolve()), data, patch, timeout, version()])
    files = home / "logs" / "run_evaluation" / run_id / MODEL / instance
    try:
        patch.encode()
    except UnicodeEncodeError:
        return _unresolved(row, "patch_not_applied", "the patch is not UTF-8, the harness cannot write it to a file\n")
    home.mkdir(parents=True, exist_ok=True)
    prediction = {"instance_id": instance, "model_name_or_path": MODEL, "model_patch": patch}
    for name, record in (("dataset.jsonl", data), ("predictions.jsonl", prediction)):
        (home / name).write_text(json.dumps(record) + "\n")
    for more in reversed(range(TRIES)):
        if _report(files, instance) is None:
            shutil.rmtree(files, ignore_errors=True)  # of a run that was interrupted: nothing of it is ours
            try:  # pulled with our patience and with room made for it, not by the harness
                with docker_engine.images().held(row["image"], instance):
                    code = _run_harness(home, run_id, timeout)
            finally:
                remove_containers([run_id])
        output, events = _text(files / "test_output.txt"), _text(files / "run_instance.log")
        report = _report(files, instance)
        if report is None or "tests_status" in report or _whole(output) or not more:
            break
        shutil.rmtree(files)
    if report:
        return _verdict(row, report, output)
    late = f"\n\nTimeout error: {timeout} seconds exceeded."
    if output.endswith(late) and output != late:  # with nothing before it, the engine never ran the script
        return _unresolved(row, "timeout", output)
    if NOT_APPLIED.search(events):
        return _unresolved(row, "patch_not_applied", events)
    why = WHY.findall(events) or _text(home / "harness.log").strip().splitlines()[-1:]
    if (files / "eval.sh").exists() and why and "OCI runtime exec failed" in why[-1]:  # a program is gone there
        return _unresolved(row, "timeout" if 'exec: "kill"' in why[-1] else "harness_error", events)
    if _tripped(events, bool(output)):
        return _unresolved(row, "harness_error", events)
    why = why[-1][:1000] if why else "it wrote nothing"
    raise InfraError(f"{instance}: the harness has no verdict (exit code {code}; {home}): {why}")


def regrade(row: dict, patch: str, end: str, log: str) -> dict:
    """The verdict of `grade` again, from its end and its log. Runs nothing."""
    if end != "graded":
        return _unresolved(row, end, log)
    from swebench.harness.grading import get_eval_report
    from swebench.harness.utils import make_test_spec

    prediction = {"instance_id": row["instance_id"], "model_name_or_path": MODEL, "model_patch": patch}
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(log.encode("utf-8", "replace"))
        file.flush()
        spec = make_test_spec(row | {"version": row.get("version") or ""})
        report = get_eval_report(spec, prediction, file.name, include_tests_status=True)
    return _verdict(row, report[row["instance_id"]], log)


def _verdict(row: dict, report: dict, log: str) -> dict:
    # The report says patch_successfully_applied = false wherever it found no outcomes; there is one only if it applied.
    return {
        "resolved": report["resolved"],
        "tests_status": report.get("tests_status") or grading.all_failed(row),
        "tampered": False,
        "patch_applied": True,
        "log": log,
        "end": "graded",
        "suspected_infra": report.get("infra_failure_reason") if report.get("infra_failure") else None,
    }


def _unresolved(row: dict, end: str, log: str) -> dict:
    return {"resolved": False, "tests_status": grading.all_failed(row), "tampered": False,
            "patch_applied": end != "patch_not_applied", "log": log, "end": end}  # fmt: skip


def _report(files: Path, instance: str) -> dict | None:
    """The harness's report of one instance; None if it is not there or was cut off."""
    try:
        return json.loads((files / "report.json").read_text())[instance]
    except (OSError, ValueError, KeyError):
        return None


def _whole(output: str) -> bool:
    """Whether the marks around the tests' output, which every eval_script prints, are both there."""
    from swebench.harness.constants import END_TEST_OUTPUT, START_TEST_OUTPUT

    return START_TEST_OUTPUT in output and END_TEST_OUTPUT in output


def _text(path: Path) -> str:
    """A file as it is, line ends included; nothing if it is not there."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _tripped(events: str, tested: bool) -> bool:
    """Whether the harness's last exception was about text that the patch or the tests made, not about the machine.

    Otherwise a program that writes what the harness cannot read would take itself out of the rates.
    """
    raised = RAISED.findall(events.rpartition("Traceback (most recent call last)")[2])
    kind = getattr(builtins, raised[0], None) if raised else None
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return False
    return issubclass(kind, UnicodeError) or (tested and not issubclass(kind, (OSError, MemoryError)))


# ---------------------------------------------------------------------------------------------------------------------
# The engine and the harness's process

def remove_containers(run_ids: list[str]) -> None:
    """Remove what containers of these runs are left; no engine, no containers."""
    import docker
    from requests import RequestException

    with contextlib.suppress(docker.errors.DockerException, RequestException):
        with contextlib.closing(docker.from_env(timeout=60)) as client:
            for run_id in run_ids:  # sweb.eval.<instance>.<run id>, sometimes with a number behind it
                for container in client.api.containers(all=True, filters={"name": run_id}):
                    with contextlib.suppress(docker.errors.APIError):  # the harness may be removing it too
                        client.api.remove_container(container["Id"], force=True)


def forget(folder: Path) -> None:
    """Remove the directories of all patches, and containers that were left (--overwrite)."""
    if run_ids := [path.name for path in folder.glob("*/logs/run_evaluation/*")]:
        remove_containers(run_ids)
        shutil.rmtree(folder)


def _run_harness(home: Path, run_id: str, timeout: int) -> int:
    """Run `_harness` below in a process of its own, with `home` as its current directory; returns its exit code."""
    command = [sys.executable, "-m", "common.official", run_id, str(timeout)]
    path = ":".join(filter(None, [str(run.ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
    with open(home / "harness.log", "wb") as log:
        child = subprocess.Popen(command, cwd=home, env=environment, stdin=subprocess.PIPE, stdout=log,
                                 stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        with child:
            return child.wait()


def _harness() -> None:
    """One run of the harness. Ends, and takes the container along, when the process that started it is gone."""
    import resource
    import traceback

    run_id, timeout = sys.argv[1:]

    def follow() -> None:
        os.read(0, 1)  # nothing is ever written there: it ends with the parent, whatever killed it
        remove_containers([run_id])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    code = 0
    try:
        from swebench.harness import run_evaluation

        run_evaluation.main(
            dataset_name="dataset.jsonl", split="test", instance_ids=None, predictions_path="predictions.jsonl",
            max_workers=1, open_file_limit=min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]), run_id=run_id,
            timeout=int(timeout), rewrite_reports=False, modal=False, report_dir=".",
        )  # fmt: skip
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a test that ran out of time leaves the harness a thread that may never end


if __name__ == "__main__":
    _harness()
