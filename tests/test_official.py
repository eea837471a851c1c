"""Official grading: what the harness's verdicts are beside ours, and its runs with a real engine.

The first part needs no engine: a sandbox stands in for the container, pytest runs in it as the harness would run it, and
swebench's own get_eval_report reads the log. The tests marked `docker` run the whole harness on small images made from
swe-dagger-test-base (Debian with bash, git, python3 and pytest).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import docker_images
import pytest

from common import grading, jsonl, official, predictions, schema, tasks
from common.errors import InfraError, InputError
from common.sandbox import LocalSandbox
from test_grading import FILES, GOLD, PASS_ALL, RIGHT, ROW, WRONG, patch_of

ROOT = Path(__file__).resolve().parent.parent
IMAGE = f"{docker_images.NAME}-calc:latest"
EVAL = """#!/bin/bash
set -uxo pipefail
cd /testbed
git checkout HEAD tests/test_calc.py
git apply -v - <<'EOF_TEST_PATCH'
%sEOF_TEST_PATCH
: '>>>>> Start Test Output'
python3 -m pytest -rA %s tests
: '>>>>> End Test Output'
git checkout HEAD tests/test_calc.py
"""
PLAIN = {name: value for name, value in ROW.items() if name != "local"} | {
    "instance_id": "calc__calc-1", "repo": "calc/calc", "problem_statement": "Mend add().", "image": IMAGE,
    "log_parser": "parse_log_pytest", "eval_type": "pass_and_fail", "eval_script": EVAL % (ROW["test_patch"], ""),
}  # fmt: skip
NAMES = ROW["FAIL_TO_PASS"] + ROW["PASS_TO_PASS"]
FORGED = "".join(f"PASSED {name}\\n" for name in NAMES)


def eval_log(patch: str, options: str = "") -> str:
    """What the harness would have in test_output.txt: the patch applied, then the eval script, in a sandbox."""
    with LocalSandbox(ROW) as box:
        for name, text in (("patch.diff", patch), ("eval.sh", EVAL % (ROW["test_patch"], options))):
            (box.folder / "tmp" / "tmp" / name).write_text(text)
            (box.folder / "tmp" / "tmp" / name).chmod(0o644)
        applied = box.run("git apply --verbose /tmp/patch.diff")
        assert applied.exit_code == 0, applied.output
        # The harness notes the exit code of the tests in the log; it edits the script for that.
        from swebench.harness.utils import make_test_spec

        spec = make_test_spec(PLAIN | {"version": "", "eval_script": EVAL % (ROW["test_patch"], options)})
        (box.folder / "tmp" / "tmp" / "eval.sh").write_text(spec.eval_script)
        return box.execute("bash /tmp/eval.sh", timeout=60, output_limit=1_000_000).output


def at_exit(code: str) -> str:
    """A program that prints results when the tests are over."""
    return f"import atexit, os\natexit.register(lambda: (os.write(1, b'''\\n{FORGED}'''), {code}))\n"


SKIPS = {"calc.py": "import pytest\n" + RIGHT.replace("return 2 * a", "pytest.skip('later')")}
EASY = """def pytest_collection_modifyitems(items):
    for item in items:
        if "wish" not in item.name:
            item.obj = lambda **_: None
"""
CASES = [  # what the patch does, its changes, local, official, options of pytest
    ("repairs", {"calc.py": RIGHT}, True, True, ""),
    ("changes nothing that matters", {"calc.py": WRONG + "\n"}, False, False, ""),
    ("repairs, and breaks another test", {"calc.py": RIGHT.replace("2 * a", "a")}, False, False, ""),
    ("repairs, and deletes the tests that the test patch touches", {"calc.py": RIGHT, "tests/test_calc.py": None},
     True, True, ""),
    ("deletes all tests", {"tests/test_calc.py": None, "tests/test_more.py": None}, False, False, ""),
    ("repairs, and deletes a listed test that the test patch does not touch",
     {"calc.py": RIGHT, "tests/test_more.py": None}, True, False, ""),
    ("repairs, breaks a listed test and rewrites it, which the test patch does not touch",
     {"calc.py": RIGHT.replace("return 2 * a", "return a and 14"), "tests/test_more.py": "def test_more(): pass\n"},
     False, True, ""),
    ("makes PASS_TO_PASS tests skip", SKIPS, False, False, ""),
    ("makes PASS_TO_PASS tests skip, and pytest names them", SKIPS, False, True, "--no-fold-skipped"),
    ("calls pytest.xfail() in the program", {"calc.py": "import pytest\n" + WRONG.replace(
        "return a - b", "pytest.xfail('later')")}, False, True, ""),
    ("prints results when it is imported", {"calc.py": f"import sys\nsys.__stdout__.write('''{FORGED}''')\n" + WRONG},
     False, False, ""),
    ("prints results at the end", {"calc.py": at_exit("None") + WRONG}, False, False, ""),
    ("prints results at the end, and ends with exit code 0", {"calc.py": at_exit("os._exit(0)") + WRONG}, False, True, ""),
    ("edits conftest.py", {"tests/conftest.py": FILES["tests/conftest.py"] + EASY}, False, True, ""),
]  # fmt: skip


@pytest.mark.parametrize("changes, local, harness, options", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_where_the_two_graders_agree_and_where_not(changes, local, harness, options):
    """The README's table, line by line. A pass of the official one where ours fails is its known weakness."""
    patch = patch_of(changes)
    log = eval_log(patch, options)
    verdict = official.regrade(PLAIN, patch, "graded", log)
    assert verdict["resolved"] == harness, log
    assert grading.grade(ROW, patch)["resolved"] == local
    assert not verdict["tampered"] and verdict["patch_applied"]
    assert {"FAIL_TO_PASS", "PASS_TO_PASS"} <= verdict["tests_status"].keys()


def test_a_missing_test_is_a_failure_for_both():
    listed = ROW["PASS_TO_PASS"] + ["tests/test_more.py::test_gone"]
    verdict = official.regrade(PLAIN | {"PASS_TO_PASS": listed}, GOLD, "graded", eval_log(GOLD))
    assert not verdict["resolved"] and verdict["tests_status"]["PASS_TO_PASS"]["failure"] == listed[-1:]
    assert not grading.grade(ROW | {"PASS_TO_PASS": listed}, GOLD)["resolved"]


def test_a_log_without_outcomes_is_a_failure_of_a_patch_that_applied():
    """The harness's report says then that the patch was not applied, and guesses from words that a program can print."""
    verdict = official.regrade(PLAIN, GOLD, "graded", "tar: Cannot allocate memory\n")
    assert not verdict["resolved"] and verdict["patch_applied"] and verdict["suspected_infra"] == "out_of_memory"
    assert verdict["tests_status"]["FAIL_TO_PASS"] == {"success": [], "failure": PLAIN["FAIL_TO_PASS"]}


def test_a_log_that_ran_out_of_time_stays_unresolved_whatever_it_says():
    verdict = official.regrade(PLAIN, GOLD, "timeout", eval_log(GOLD))
    assert not verdict["resolved"] and verdict["patch_applied"]


@pytest.mark.parametrize("raised, tested, fault", [
    ("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9 in position 3: invalid continuation byte", False, True),
    ("IndexError: list index out of range", True, True), ("IndexError: list index out of range", False, False),
    ("docker.errors.APIError: 500 Server Error", True, False), ("OSError: [Errno 28] No space left on device", True, False),
    ("requests.exceptions.ReadTimeout: Read timed out.", True, False), ("ConnectionResetError", True, False),
])  # fmt: skip
def test_who_is_to_blame_for_an_exception_of_the_harness(raised, tested, fault):
    events = ("2026-01-02 03:04:05,678 - INFO - Git diff before:\n+Traceback (most recent call last):\n+ValueError: x\n"
              "2026-01-02 03:04:05,678 - ERROR - Error in evaluating model for calc__calc-1: y\nTraceback (most recent call "
              f"last):\n  File \"x.py\", line 1, in f\n    g()\n{raised}\n\nCheck (x) for more information.\n")  # fmt: skip
    assert official._tripped(events, tested) == fault


def test_a_patch_cannot_pretend_that_it_was_not_applied():
    stamp = "2026-01-02 03:04:05,678 - INFO - "
    assert official.NOT_APPLIED.search(f"{stamp}Failed\n{stamp}>>>>> Patch Apply Failed:\nerror: x\n")
    assert not official.NOT_APPLIED.search(f"{stamp}Git diff before:\n+{stamp}>>>>> Patch Apply Failed\n>>>>> Patch Apply Failed")


@pytest.mark.parametrize("lost, resolved, runs", [(0, True, 1), (1, True, 2), (9, False, 3)])
def test_a_log_whose_beginning_was_lost_is_made_again(monkeypatch, tmp_path, lost, resolved, runs):
    """Seen with a busy engine: the lines before pytest's were not in the log, and a right patch was unresolved."""
    from swebench.harness.grading import get_eval_report
    from swebench.harness.utils import make_test_spec

    whole = ("+ : '>>>>> Start Test Output'\n" + "".join(f"PASSED {name}\n" for name in NAMES)
             + "+ : '>>>>> End Test Output'\n>>>>> Test Exit Code: 0\n")  # fmt: skip
    logs = []

    def harness(home, run_id, timeout):
        files = home / "logs" / "run_evaluation" / run_id / official.MODEL / PLAIN["instance_id"]
        files.mkdir(parents=True)
        logs.append(whole if len(logs) >= lost else whole.partition("\n")[2])
        (files / "test_output.txt").write_text(logs[-1])
        prediction = json.loads((home / "predictions.jsonl").read_text())
        report = get_eval_report(make_test_spec(PLAIN | {"version": ""}), prediction, files / "test_output.txt", True)
        (files / "report.json").write_text(json.dumps(report))
        return 0

    monkeypatch.setattr(official, "_run_harness", harness)
    monkeypatch.setattr(official, "remove_containers", lambda run_ids: None)
    held = SimpleNamespace(held=lambda image, who: contextlib.nullcontext())
    monkeypatch.setattr(official.docker_engine, "images", lambda: held)
    assert (official.grade(PLAIN, GOLD, tmp_path)["resolved"], len(logs)) == (resolved, runs)


# ---------------------------------------------------------------------------------------------------------------------
# The script, without an engine

def script(*args, code=0, **environment):
    done = subprocess.run([sys.executable, ROOT / "04_eval.py", *map(str, args)], capture_output=True, text=True,
                          env=os.environ | environment)  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
        return done.stderr
    return dict(word.split("=", 1) for word in done.stdout.strip().splitlines()[-1].split()[1:])


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def predict(path, patches):
    return lines(path, [{"instance_id": n, "model_name_or_path": "m/x", "model_patch": p} for n, p in patches.items()])


NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}


def test_rows_are_checked_before_anything_runs(tmp_path):
    patches = predict(tmp_path / "p.jsonl", {PLAIN["instance_id"]: GOLD})
    for change, message in (
        ({"image": None, "eval_script": " "}, "calc__calc-1: no image, eval_script, which the official harness needs, and no `l"),
        ({"log_parser": "parse_log_nothing"}, "calc__calc-1: log_parser 'parse_log_nothing' is none of"),
        ({"eval_type": "guess"}, "calc__calc-1: eval_type 'guess' is none of fail_only, pass_and_fail"),
        ({"eval_script": "pytest"}, "calc__calc-1: eval_script never prints '>>>>> Start Test Output'"),
    ):
        data = lines(tmp_path / "t.jsonl", [PLAIN | change])
        assert message in script("--tasks", data, "--predictions", patches, "--out", tmp_path / "o", code=2, **NO_ENGINE)
    data = lines(tmp_path / "t.jsonl", [PLAIN | {"instance_id": "../calc"}])
    assert "letters" in script("--tasks", data, "--predictions", patches, "--out", tmp_path / "o", code=2, **NO_ENGINE)
    assert not (tmp_path / "o").exists()


def test_who_grades():
    both, local = PLAIN | {"local": ROW["local"]}, ROW | {"instance_id": "l"}
    assert official.choose([PLAIN, local], "auto") == {"calc__calc-1": "swebench", "l": "local"}
    assert official.choose([both], "auto") == {"calc__calc-1": "local"}
    assert official.choose([both], "swebench") == {"calc__calc-1": "swebench"}
    with pytest.raises(InputError, match="l: no image, log_parser, eval_type, eval_script"):
        official.choose([local], "swebench")


def test_no_engine_is_one_line_and_exit_1_but_empty_patches_need_none(tmp_path):
    data = lines(tmp_path / "t.jsonl", [PLAIN, PLAIN | {"instance_id": "calc__calc-2"}])
    gold = predict(tmp_path / "gold.jsonl", {"calc__calc-1": GOLD})
    message = script("--tasks", data, "--predictions", gold, "--out", tmp_path / "gold", code=1, **NO_ENGINE)
    assert message.startswith("error: no Docker engine: ") and message.count("\n") == 1
    empty = predict(tmp_path / "empty.jsonl", {"calc__calc-1": None})
    counted = script("--tasks", data, "--predictions", empty, "--out", tmp_path / "empty", **NO_ENGINE)
    assert (counted["tasks"], counted["resolved"], counted["rate_of_all"], counted["grader"]) == ("2", "0", "0", "swebench")
    results = list(jsonl.read(tmp_path / "empty" / "results.jsonl", "result"))
    assert {r["failure_mode"] for r in results} == {"no_patch"} and {r["grader"] for r in results} == {"swebench"}


def test_the_three_forms_of_predictions(tmp_path):
    records = [{"instance_id": name, "model_name_or_path": "m", "model_patch": None} for name in ("a", "b")]
    lines(tmp_path / "p.jsonl", records)
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "object.json").write_text(json.dumps({record["instance_id"]: record for record in records}))
    forms = [[record for _, record in predictions.read(tmp_path / name)] for name in ("p.jsonl", "list.json", "object.json")]
    assert forms == [records] * 3
    for content, message in (
        ('{"a": {"model_patch": ""}, "a": {"model_patch": ""}}', "x.json: 'a' is there twice"),
        ('{"a": {"instance_id": "b", "model_patch": ""}}', r"x.json\['a'\]: instance_id is 'b'"),
        ('[{"instance_id": "a", "model_patch": ""}, {"instance_id": "a"}]', r"x.json\[1\]: prediction: field 'model_patch'"),
        ('["a"]', r"x.json\[0\]: must be a prediction"), ("3", "neither a list"), ("{", "not JSON"),
    ):  # fmt: skip
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(InputError, match=message):
            list(predictions.read(tmp_path / "x.json"))


def test_unknown_and_double_ids_in_a_list_are_refused(tmp_path):
    for names, message in ((["who"], "[0]: instance_id 'who' is not in --tasks"), (["calc__calc-1"] * 2, "[1]: 'calc__calc-1' is th")):
        (tmp_path / "p.json").write_text(json.dumps([{"instance_id": name, "model_patch": "x"} for name in names]))
        data = lines(tmp_path / "t.jsonl", [PLAIN])
        assert message in script("--tasks", data, "--predictions", tmp_path / "p.json", "--out", tmp_path / "o", code=2)


def test_a_local_log_is_graded_again_and_foreign_ones_are_refused(tmp_path):
    """The program prints lines like those that hold the outcomes; only what grading wrote behind them counts."""
    names = ROW["FAIL_TO_PASS"] + ["tests/test_more.py::a name with spaces PASSED"]
    row = ROW | {"FAIL_TO_PASS": names}
    forged = "".join(f"FAIL_TO_PASS {name} PASSED\\n" for name in names)
    printing = patch_of({"calc.py": f"import sys\nsys.__stdout__.write('''{forged}''')\nsys.__stdout__.flush()\n" + WRONG})
    path = tmp_path / "log.txt"
    for patch in (GOLD, printing, "no patch\n", ""):
        verdict = grading.grade(row, patch) if patch else grading.no_patch(row)
        grading.save_log(path, row, "local", patch, verdict)
        again = grading.regrade(row, *grading.read_log(path, row, "local", patch))
        assert {k: again[k] for k in verdict if k != "end"} == {k: v for k, v in verdict.items() if k != "end"}
    conftest = patch_of({"calc.py": RIGHT, "conftest.py": PASS_ALL})
    verdict = grading.grade(ROW, conftest)
    grading.save_log(path, ROW, "local", conftest, verdict)
    assert verdict["tampered"] and grading.regrade(ROW, *grading.read_log(path, ROW, "local", conftest)) == verdict
    for row, grader, patch, what in ((ROW, "local", GOLD, "patch"), (ROW | {"test_patch": ""}, "local", conftest, "task"),
                                     (PLAIN | {"instance_id": "calc-1"}, "swebench", conftest, "grader")):  # fmt: skip
        with pytest.raises(InputError, match=f"log.txt: the log of another {what}"):
            grading.read_log(path, row, grader, patch)
    end, log = grading.read_log(path, ROW, "local", conftest)
    with pytest.raises(InputError, match="does not end with one line for each test"):
        grading.regrade(ROW, end, log.replace("test_twice ", "test_thrice "))
    with pytest.raises(InputError, match="gone.txt: No such file"):
        grading.read_log(tmp_path / "gone.txt", ROW, "local", GOLD)


def test_regrade_writes_the_same_results_and_refuses_what_is_not_there(tmp_path):
    rows = tasks.load("toy:dev:3")
    gold = {row["instance_id"]: row["patch"] for row in rows[:2]}
    (tmp_path / "p.json").write_text(json.dumps({n: {"model_patch": p} for n, p in gold.items()}))
    words = ("--tasks", "toy:dev:3", "--predictions", tmp_path / "p.json", "--out", tmp_path / "o")
    assert "not a finished output" in script(*words, "--regrade", code=2)
    counted = script(*words)
    assert (counted["resolved"], counted["grader"]) == ("2", "local") and "rate_of_all" not in counted
    before = {name: (tmp_path / "o" / name).read_text() for name in ("results.jsonl", "summary.json")}
    (tmp_path / "o" / "results.jsonl").write_text(before["results.jsonl"].replace('"resolved": true', '"resolved": false'))
    assert script(*words, "--regrade") == counted
    assert before == {name: (tmp_path / "o" / name).read_text() for name in before}
    assert len(json.loads((tmp_path / "o" / "manifest.json").read_text())["amended"]) == 1
    gold[rows[1]["instance_id"]] += "\n"
    (tmp_path / "p.json").write_text(json.dumps({n: {"model_patch": p} for n, p in gold.items()}))
    log = tmp_path / "o" / "logs" / f"{rows[1]['instance_id']}.txt"
    assert f"{log}: the log of another patch" in script(*words, "--regrade", code=2)
    log.unlink()
    assert f"{log}: No such file" in script(*words, "--regrade", code=2)
    assert before == {name: (tmp_path / "o" / name).read_text() for name in before}


# ---------------------------------------------------------------------------------------------------------------------
# The whole harness, with an engine

@pytest.fixture(scope="module")
def engine():
    """A Docker client; the image that holds the calc repository is made."""
    import docker

    if docker_images.why_not():
        pytest.skip(docker_images.why_not())
    assert docker_images.build("calc", FILES, end="STOPSIGNAL SIGKILL") == IMAGE
    with contextlib.closing(docker.from_env(timeout=120)) as client:
        yield client


def ours(client) -> list[str]:
    """Containers of the harness that are there, running or not."""
    return [name for c in client.api.containers(all=True, filters={"ancestor": IMAGE}) for name in c["Names"]]


def task(number: int, **changes) -> dict:
    return PLAIN | {"instance_id": f"calc__calc-{number}"} | changes


@pytest.mark.docker
@pytest.mark.slow
def test_the_harness_grades_and_what_the_machine_failed_is_kept_apart(engine, tmp_path):
    patches = {
        "gold": GOLD, "empty": "", "deleted": patch_of({"tests/test_calc.py": None, "tests/test_more.py": None}),
        "spoofed": patch_of({"calc.py": at_exit("os._exit(0)") + WRONG}), "no patch": "no patch at all\n",
        "hangs": patch_of({"calc.py": "import time\n" + RIGHT.replace("return 2", "time.sleep(1000)\n    return 2")}),
        "latin": patch_of({"calc.py": "open('lib/deep.py', 'wb').write(b'\\xe9\\n' * 9)\n" + RIGHT}),
        "binary name": GOLD.replace("calc.py", "\udce9.py"), "no image": GOLD,
    }  # fmt: skip
    rows = [task(n, image="swe-dagger-test-nowhere:1" if name == "no image" else IMAGE) for n, name in enumerate(patches)]
    data = lines(tmp_path / "t.jsonl", rows)
    given = predict(tmp_path / "p.jsonl", {row["instance_id"]: patch for row, patch in zip(rows, patches.values())})
    words = ("--tasks", data, "--predictions", given, "--out", tmp_path / "o", "--test-timeout", 30, "--workers", 2,
             "--infra-retries", 1, "--max-infra", 0.2)  # fmt: skip
    counted = script(*words)
    assert (counted["tasks"], counted["resolved"], counted["infra_errors"], counted["grader"]) == ("9", "2", "1", "swebench")
    assert float(counted["rate"]) == 2 / 8 and float(counted["rate_of_all"]) == pytest.approx(2 / 9)
    names = dict(zip((row["instance_id"] for row in rows), patches))
    modes = {names[r["instance_id"]]: r["failure_mode"] for r in jsonl.read(tmp_path / "o" / "results.jsonl", "result")}
    assert modes == {
        "gold": None, "spoofed": None,  # the known weakness: a program that prints results is believed
        "empty": "no_patch", "deleted": "wrong_file", "no patch": "patch_not_applied", "hangs": "tests_failed",
        "latin": "tests_failed", "binary name": "patch_not_applied",
    }  # fmt: skip
    infra = list(jsonl.read(tmp_path / "o" / "results.jsonl.infra.jsonl"))  # one line for each of two tries
    assert infra[-1]["job"][0] == "calc__calc-8" and "swe-dagger-test-nowhere" in infra[-1]["error"]
    assert "PASSED tests/test_calc.py::test_add" in (tmp_path / "o" / "logs" / "calc__calc-0.txt").read_text()
    assert not (tmp_path / "o" / "logs" / "calc__calc-8.txt").exists() and not ours(engine)
    before = (tmp_path / "o" / "results.jsonl").read_text()
    assert script(*words, "--regrade", **NO_ENGINE) == counted
    assert (tmp_path / "o" / "results.jsonl").read_text() == before


@pytest.mark.docker
@pytest.mark.slow
def test_another_patch_is_graded_again_and_the_same_is_not(engine, tmp_path):
    """The harness itself would read the old report: same run id, same instance, same model."""
    home = tmp_path / "calc"
    first = official.grade(PLAIN, GOLD, home)
    assert first["resolved"] and first["end"] == "graded"
    assert not official.grade(PLAIN, patch_of({"calc.py": WRONG + "\n"}), home)["resolved"]
    log = (home / "harness.log").stat().st_mtime_ns
    assert official.grade(PLAIN, GOLD, home) == first and (home / "harness.log").stat().st_mtime_ns == log
    assert not ours(engine)


@pytest.mark.docker
@pytest.mark.slow
def test_a_torn_report_is_not_believed(engine, tmp_path):
    official.grade(PLAIN, GOLD, tmp_path)
    (report,) = tmp_path.rglob("report.json")
    report.write_text(report.read_text()[:40])
    assert official.grade(PLAIN, GOLD, tmp_path)["resolved"]
    with pytest.raises(InfraError, match="swe-dagger-test-nowhere"):
        official.grade(PLAIN | {"image": "swe-dagger-test-nowhere:1"}, GOLD, tmp_path)


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_and_leaves_no_container(engine, tmp_path, sign):
    slow = patch_of({"calc.py": "import time\ntime.sleep(12)\n" + RIGHT})
    data = lines(tmp_path / "t.jsonl", [task(1), task(2)])
    given = predict(tmp_path / "p.jsonl", {"calc__calc-1": GOLD, "calc__calc-2": slow})
    words = ("--tasks", data, "--predictions", given, "--out", tmp_path / "o", "--workers", 1)
    running = subprocess.Popen([sys.executable, ROOT / "04_eval.py", *map(str, words)], stderr=subprocess.DEVNULL)
    wait_for(lambda: any("calc__calc-2" in name for name in ours(engine)), 300)
    os.kill(running.pid, sign)
    assert running.wait() in (-signal.SIGKILL, 1)
    wait_for(lambda: not ours(engine), 120)  # the harness's process sees that its parent is gone
    part = (tmp_path / "o" / "results.jsonl.part").read_text()
    assert json.loads(part)["instance_id"] == "calc__calc-1"
    assert script(*words)["resolved"] == "2"
    assert (tmp_path / "o" / "results.jsonl").read_text().startswith(part) and not ours(engine)


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.docker
@pytest.mark.slow
def test_several_trajectories_of_one_task(engine, tmp_path):
    """The harness keys by instance id; each patch has a run of its own here."""
    head = {"schema": schema.VERSION, "instance_id": "calc__calc-1", "base_commit": "0" * 40, "iteration": 1, "seed": 0, "mix": "student",
            "beta": 0.0, "student": None, "teacher": None, "prompt": "p", "limits": {}, "messages": [], "started": 1.0, "finished": 2.0}  # fmt: skip
    ends = (("submitted", GOLD), ("turn_limit", patch_of({"calc.py": WRONG + "\n"})))
    path = lines(tmp_path / "trajectories.jsonl", [
        head | {"trajectory_id": f"calc__calc-1.i1.a{n}", "attempt": n, "exit_status": end, "patch": patch} for n, (end, patch) in enumerate(ends)
    ])  # fmt: skip
    data = lines(tmp_path / "t.jsonl", [PLAIN])
    script("--tasks", data, "--trajectories", path, "--out", tmp_path / "grades")
    results = list(jsonl.read(tmp_path / "grades" / "results.jsonl", "result"))
    assert [(r["trajectory_id"][-2:], r["resolved"], r["failure_mode"]) for r in results] == [("a0", True, None), ("a1", False, "turn_limit")]
    assert (tmp_path / "grades" / "logs" / "calc__calc-1.i1.a1.txt").exists()
