"""Grades a patch of a task that has `local`, in a fresh sandbox.

The rule is SWE-bench's: from a clean checkout with the patch, the test patch applied, every FAIL_TO_PASS and
PASS_TO_PASS test must pass (an expected failure, XFAIL, counts, as in swebench; a skipped test does not, where swebench
lets a skipped PASS_TO_PASS test count); a test that is missing has failed. What a patch does to its own examination is
undone first:

* every file that the test patch touches or that holds a listed test is what base_commit, gold patch and test patch make
  it;
* so are the files that steer the tests: conftest.py, pytest.ini, pytest's part of tox.ini, setup.cfg and
  pyproject.toml, sitecustomize.py, *.pth, compiled files, planted packages' metadata, a new module with the name of
  pytest or its parts, and the files named in test_cmd. A result that needed this is marked tampered.

Outcomes come from our own pytest plugin (common/pytest_report.py), signed, and not from printed text. A task with a
log_parser is different: its outcomes are read from what the tests print, and a patched program can print results. Code
that attacks the test process's own memory is out of scope. Helper modules of the tests that hold no listed test are the
patch's own, as with SWE-bench.

All this is done on file lists in git's object store (common/checkout.py); no code of the patch runs before the tests.
"""

import ast
import hmac
import json
import os
import re
import secrets
import shlex
import shutil
import tomllib
from pathlib import Path

from common import run
from common.checkout import Checkout, PatchError
from common.errors import InputError
from common.failures import UNPARSED
from common.repository import Files
from common.sandbox import LocalSandbox

DEFAULT_TEST_COMMAND = "python -m pytest -q"
STEERING = {"conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml"}
SECTIONS = {"pyproject.toml": "pytest", "setup.cfg": "tool:pytest", "tox.ini": "pytest"}
SHADOWS = {"pytest", "_pytest", "pluggy", "py", "iniconfig", "sitecustomize", "usercustomize"}
PYTEST = re.compile(r"(?P<python>(?:^|(?<=[\s;&|(]))\S*python[\d.]*(?:\s+(?:-[XW]\s+\S+|-\S+))*?)\s+-m\s+"
                    r"(?:pytest|py\.test)(?=\s|$)"
                    r"|(?:^|(?<=[\s;&|(]))(?:\S*/)?(?:pytest|py\.test)(?=\s|$)")
OUTSIDE = re.compile(r"^(---|\+\+\+|diff --git|rename|copy) (.*[\s/])?((\.\.|\.git)(/|\s|$)|/(?!dev/null))", re.M)
KEPT_LOG = 200_000  # characters
KEPT_REPORT = 64_000_000  # bytes


def grade(row: dict, patch: str, *, timeout: float = 600.0) -> dict:
    """Grade one patch. timeout: seconds for the tests.

    Returns resolved, tests_status (as SWE-bench's report has it), tampered, patch_applied and log. Raises InputError
    for a row that cannot be graded (its own patches do not apply), InfraError if the sandbox breaks.
    """
    check_command(row)
    tests = {kind: test_list(row, kind) for kind in ("FAIL_TO_PASS", "PASS_TO_PASS")}
    with LocalSandbox(row, output_limit=KEPT_LOG) as sandbox:
        checkout = sandbox.checkout
        try:
            gold = checkout.apply(checkout.base, row.get("patch") or "")
            tested = checkout.apply(gold, row.get("test_patch") or "")
        except PatchError as error:
            raise InputError(f"{row['instance_id']}: its own patch or test_patch does not apply: {error}") from None
        touched = {path for path in gold.keys() | tested.keys() if gold.get(path) != tested.get(path)}
        try:
            patched = apply_patch(row, checkout, patch)
        except PatchError as error:
            return _result(tests, {}, False, False, [f"patch does not apply: {error}"])
        listed = {name.split("::")[0] for names in tests.values() for name in names if "::" in name}
        files, tampered = put_back(row, checkout, patched, tested, touched | (listed & tested.keys()))
        log = ["patch applied"] + [f"put back: {path}" for path in tampered]
        log += [f"{UNPARSED}{path}" for path in unparsed(checkout, files)]
        checkout.write(files)
        outcomes = run_tests(sandbox, tests, files, sorted(touched), timeout, log)
    return _result(tests, outcomes, bool(tampered), True, log)


def test_list(row: dict, kind: str) -> list[str]:
    """FAIL_TO_PASS or PASS_TO_PASS of a row, where it may be a list or, as in SWE-bench's data sets, a list in JSON."""
    names = row.get(kind) or []
    try:
        names = json.loads(names) if isinstance(names, str) else names
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{row['instance_id']}: {kind} is not a list of test names")
    return names


def all_failed(row: dict) -> dict:
    """tests_status where no test ran."""
    return {kind: {"success": [], "failure": test_list(row, kind)} for kind in ("FAIL_TO_PASS", "PASS_TO_PASS")}


def no_patch(row: dict) -> dict:
    """The verdict on an empty patch, as with the official harness: unresolved, and nothing is run."""
    return {"resolved": False, "tests_status": all_failed(row), "tampered": False, "patch_applied": True,
            "log": "no patch: nothing was run\n", "end": "no_patch"}


def _result(tests: dict, outcomes: dict[str, str], tampered: bool, applied: bool, log: list[str]) -> dict:
    status, passed = {}, True
    for kind, names in tests.items():
        good = [name for name in names if outcomes.get(name) in ("PASSED", "XFAIL")]
        bad = [name for name in names if name not in set(good)]
        status[kind] = {"success": good, "failure": bad}
        passed = passed and not bad
        log += [f"{kind} {name} {outcomes.get(name, 'MISSING')}" for name in names] if applied else []
    return {"resolved": applied and passed and any(tests.values()), "tests_status": status, "tampered": tampered,
            "patch_applied": applied, "log": "\n".join(log) + "\n"}


# ---------------------------------------------------------------------------------------------------------------------
# Saved logs, and grading again from them

def save_log(path: Path, row: dict, grader: str, patch: str, verdict: dict) -> None:
    """Write a verdict's log. Its first line says what it is the log of; the rest is verdict["log"]."""
    head = {**_identity(row, grader, patch), "end": verdict.get("end", "graded")}
    path.write_bytes(f"{json.dumps(head)}\n{verdict['log']}".encode("utf-8", "replace"))


def read_log(path: Path, row: dict, grader: str, patch: str) -> tuple[str, str]:
    """(end, log) that save_log wrote for this patch. Raises InputError for a missing log and for one of other work."""
    try:
        first, _, log = path.read_bytes().decode("utf-8", "replace").partition("\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; without this log the patch has to be graded again") from None
    try:
        head = json.loads(first)
        end = head.pop("end")
    except (ValueError, AttributeError, KeyError):
        raise InputError(f"{path}: its first line does not say which patch it belongs to") from None
    for name, value in _identity(row, grader, patch).items():
        if head.get(name) != value:
            raise InputError(f"{path}: the log of another {name} ({head.get(name)!r}, not {value!r}): grade it again")
    return end, log


def _identity(row: dict, grader: str, patch: str) -> dict:
    """What a log depends on. The official one does not depend on the lists of tests nor on the parser."""
    if grader == "swebench":
        task = [row.get(name) for name in ("base_commit", "image", "eval_script")]
    else:
        local = {name: value for name, value in row["local"].items() if name not in ("source", "python")}  # may move
        names = ("base_commit", "patch", "test_patch", "FAIL_TO_PASS", "PASS_TO_PASS")
        task = [row.get(name) for name in names] + [local]
    return {"instance_id": row["instance_id"], "grader": grader, "task": run.hash_json(task),
            "patch": run.hash_json(patch)}


def regrade(row: dict, end: str, log: str) -> dict:
    """The verdict of `grade` again, from its log. Runs nothing. Raises InputError if the log was changed."""
    if end == "no_patch":
        return no_patch(row)
    tests = {kind: test_list(row, kind) for kind in ("FAIL_TO_PASS", "PASS_TO_PASS")}
    applied = log.startswith("patch applied\n")
    outcomes, rest = {}, log.removesuffix("\n")
    # From behind: the program under test may have printed such lines too, but those stand before ours.
    for kind, name in reversed([(kind, name) for kind, names in tests.items() for name in names] if applied else []):
        rest, _, outcome = rest.rpartition(" ")
        line = f"\n{kind} {name}".encode("utf-8", "replace").decode()
        if not rest.endswith(line):
            raise InputError(f"{row['instance_id']}: its log does not end with one line for each test: "
                             f"{line.strip()!r} is missing")
        rest = rest.removesuffix(line)
        outcomes[name] = outcome
    tampered = applied and log.split("\n")[1].startswith("put back: ")
    return _result(tests, outcomes, tampered, applied, []) | {"log": log}


# ---------------------------------------------------------------------------------------------------------------------
# The files that are tested

def apply_patch(row: dict, checkout: Checkout, patch: str) -> Files:
    """The files after the patch, applied by git; else, as SWE-bench does it, by `patch --fuzz=5`. Raises PatchError."""
    try:
        return checkout.apply(checkout.base, patch)
    except PatchError as error:
        if OUTSIDE.search(patch):
            raise
        try:
            text = os.fsencode(patch)
        except UnicodeEncodeError:  # half a character: no file can hold it
            raise error from None
        with LocalSandbox(row) as other:
            path = other.folder / "tmp" / "tmp" / "agent.patch"
            path.write_bytes(text)
            path.chmod(0o644)
            code = other.run("patch --batch --fuzz=5 -p1 --no-backup-if-mismatch -i /tmp/agent.patch").exit_code
            if code == 127:
                raise InputError("grading needs the program `patch`, for patches that git does not take: install it") from None
            if code:
                raise
            fuzzy = other.checkout.read()
            for mode, blob in fuzzy.values():
                if not (checkout.objects / blob[:2] / blob[2:]).exists() and mode != "160000":
                    source = other.checkout.objects / blob[:2] / blob[2:]
                    if source.exists():
                        (checkout.objects / blob[:2]).mkdir(exist_ok=True)
                        shutil.copyfile(source, checkout.objects / blob[:2] / blob[2:])
            if fuzzy == checkout.base:
                raise error
            return fuzzy


def put_back(row: dict, checkout: Checkout, patched: Files, tested: Files,
             protected: set[str]) -> tuple[Files, list[str]]:
    """(the files to test, the steering files that the patch had changed): see the module's docstring."""
    base, files, tampered = checkout.base, dict(patched), []
    command = row["local"].get("test_cmd") or DEFAULT_TEST_COMMAND
    named = {os.path.normpath(word) for word in _words(command)} & base.keys()
    roots = {"", *(root + "/" for root in _python_path(row, inside=True))}
    restored = set(protected)
    for path in {p for f in (patched, tested) for p in f}:
        if patched.get(path) == tested.get(path):
            continue
        section = SECTIONS.get(os.path.basename(path))
        if section and all(path not in f or f[path][0] != "120000" for f in (base, patched, tested)):
            was, now, wanted = (_section(checkout, f, path, section) for f in (base, patched, tested))
            if now == wanted:
                continue
            changed = now != was
        elif section or path in named or steers(path, roots, base):
            changed = patched.get(path) != base.get(path)
        else:
            continue
        restored.add(path)
        if changed:
            tampered.append(path)
    for path in restored:
        for other in [p for p in files if path.startswith(p + "/") or p.startswith(path + "/")]:
            del files[other]  # a file where a directory belongs, or the other way round
        files.pop(path, None)
    files |= {path: tested[path] for path in restored if path in tested}
    return files, sorted(tampered)


def unparsed(checkout: Checkout, files: Files) -> list[str]:
    """The Python files that could be parsed at the base and no longer can."""
    def parses(blob: str) -> bool:
        try:
            ast.parse(checkout.blob(blob))
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the latter two: nested too deep
            return False
        return True

    changed = [path for path, entry in sorted(files.items()) if path.endswith(".py") and entry[0].startswith("100")
               and checkout.base.get(path, entry) != entry]
    return [path for path in changed if not parses(files[path][1]) and parses(checkout.base[path][1])]


def steers(path: str, roots: set[str], base: Files) -> bool:
    """Whether a file of this name can change what pytest or Python does before the tests come into it."""
    parts = path.split("/")
    if parts[-1] in STEERING or parts[-1].endswith((".pth", ".pyc", ".pyo", ".egg-link")) or "__pycache__" in parts:
        return True
    if any(part.endswith((".dist-info", ".egg-info")) for part in parts):
        return True
    if {part.split(".")[0] for part in parts[-2:]} & {"sitecustomize", "usercustomize"}:
        return True
    for root in roots:
        name = path.removeprefix(root).split("/")[0].split(".")[0] if path.startswith(root) else ""
        if name in SHADOWS and not any(p.startswith((f"{root}{name}/", f"{root}{name}.")) for p in base):
            return True
    return False


def _section(checkout: Checkout, files: Files, path: str, name: str):
    """pytest's part of a configuration file; None if there is none; text that cannot be parsed stands for itself."""
    if path not in files:
        return None
    data = checkout.blob(files[path][1])
    try:
        text = data.decode("utf-8-sig")
        if path.endswith(".toml"):
            return tomllib.loads(text).get("tool", {}).get(name)
    except (ValueError, AttributeError, RecursionError):  # no TOML, no table, nested too deep
        return data
    import iniconfig  # what pytest itself reads these files with: lines may end in more ways than one

    try:
        sections = iniconfig.IniConfig(path, text.replace("\r\n", "\n").replace("\r", "\n")).sections
    except iniconfig.ParseError:
        return data
    return dict(sections[name]) if name in sections else None


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _python_path(row: dict, inside: bool) -> list[str]:
    """The directories of the row's PYTHONPATH that are inside the repository (relative to it), or the others."""
    out = []
    for entry in str((row["local"].get("env") or {}).get("PYTHONPATH") or "").split(":"):
        relative = os.path.relpath(os.path.join("/testbed", entry), "/testbed")
        if entry and (not relative.startswith("..")) == inside:
            out.append(relative if inside else entry)
    return [path for path in out if path != "."] if inside else out


# ---------------------------------------------------------------------------------------------------------------------
# The tests

def check_command(row: dict) -> None:
    """Raises InputError where the outcomes of this row's tests could not be read."""
    command, parser = row["local"].get("test_cmd") or DEFAULT_TEST_COMMAND, row["local"].get("log_parser")
    if not parser and not PYTEST.search(command):
        raise InputError(f"{row['instance_id']}: local.test_cmd {command!r} does not run pytest, "
                         "so local.log_parser must say how to read what it prints")
    if parser:
        from swebench.harness.log_parsers import PARSER_REGISTRY  # late: it takes seconds

        if parser not in PARSER_REGISTRY:
            raise InputError(f"{row['instance_id']}: unknown log_parser {parser!r}; swebench has {', '.join(sorted(PARSER_REGISTRY))}")


def run_tests(sandbox: LocalSandbox, tests: dict[str, list[str]], files: Files, touched: list[str], timeout: float,
              log: list[str]) -> dict[str, str]:
    """Run the listed tests; returns name -> PASSED, XFAIL, FAILED, ... and adds what was printed to the log."""
    command = sandbox.local.get("test_cmd") or DEFAULT_TEST_COMMAND
    parser = sandbox.local.get("log_parser")
    names = [name for listed in tests.values() for name in listed]
    if parser:
        return _run_printing(sandbox, parser, command, names, files, touched, timeout, log)
    found = PYTEST.search(command)
    wanted = [path for path in dict.fromkeys(name.split("::")[0] for name in names if "::" in name) if path in files]
    arguments = " ".join(map(shlex.quote, wanted or [path for path in touched if path in files]))
    if len(arguments) > 100_000:
        arguments = " ".join(map(shlex.quote, sorted({os.path.dirname(path) or "." for path in wanted})))
    log.append(f"$ {command} {arguments if len(arguments) < 2000 else arguments[:2000] + ' ...'}")
    python = found["python"] or "python"
    launch = (f"{python} /run/grading/pytest_report.py {int(found['python'] is not None)} "
              f"--continue-on-collection-errors --maxfail=0")
    folder = sandbox.folder / "grading"
    report = folder / "report"
    report.mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("pytest_report.py"), folder / "pytest_report.py")
    (folder / "pytest_report.py").chmod(0o644)
    sandbox.meter.folders.append(report)  # the tests can write there
    secret = secrets.token_hex(32)
    roots = ["", *(root + "/" for root in _python_path(sandbox.row, inside=True))]
    (report / "settings.json").write_text(json.dumps({
        "secret": secret, "tests": names, "pythonpath": _entries(sandbox.row),
        "environment": sandbox.environment.get("PYTHONPATH"),
        "tests_pytest": any(path.startswith(f"{root}_pytest/") for root in roots for path in files),
    }))
    if sandbox.uid is not None:
        for path in (report, report / "settings.json"):
            os.chown(path, sandbox.uid, sandbox.uid)
    environment = {name: value for name, value in sandbox.environment.items() if name != "PYTHONPATH"}
    if others := _python_path(sandbox.row, inside=False):
        environment["PYTHONPATH"] = ":".join(others)
    result = sandbox.execute(
        f"{command[:found.start()]}{launch}{command[found.end():]} {arguments}",
        timeout=timeout, environment=environment,
        mounts=("--perms", "0755", "--dir", "/run", "--perms", "0755", "--dir", "/run/grading",
                "--ro-bind", str(folder / "pytest_report.py"), "/run/grading/pytest_report.py",
                "--bind", str(report), "/run/grading/report"))
    log += _printed(result, timeout)
    return _outcomes(report / "outcomes", secret)


def _entries(row: dict) -> list[str]:
    inside = str((row["local"].get("env") or {}).get("PYTHONPATH") or "").split(":")
    others = set(_python_path(row, inside=False))
    return [entry for entry in inside if entry and entry not in others]


def _printed(result, timeout: float) -> list[str]:
    """What the tests printed, without the seconds they took, and how they ended."""
    text = re.sub(r"\b\d+\.\d+ ?s(econds)?\b(?: \(\d+:\d\d:\d\d\))?", "N s", result.output).rstrip()
    end = f"killed after {timeout:g} s" if result.timed_out else f"exit {result.exit_code}"
    return [text, end] if text else [end]


def _outcomes(path: Path, secret: str) -> dict[str, str]:
    """Read the signed report: the worst of what was said of each name."""
    seen: dict[str, dict[str, str]] = {}  # name -> phase -> outcome
    if path.is_symlink() or not path.is_file():
        return {}
    with open(path, "rb") as file:
        lines = file.read(KEPT_REPORT).split(b"\n")
    count = 0
    for line in lines:
        sign, _, text = line.partition(b" ")
        if not hmac.compare_digest(sign, hmac.new(secret.encode(), text, "sha256").hexdigest().encode()):
            continue
        number, record = json.loads(text)
        if number != count + 1:  # a line is there twice, or one is gone
            continue
        count = number
        for name in record["names"]:
            phases = seen.setdefault(name, {})
            if phases.get(record["when"]) != "failed":
                phases[record["when"]] = record["outcome"]
    return {name: _outcome(phases) for name, phases in seen.items()}


def _outcome(phases: dict[str, str]) -> str:
    """One word for a test's set-up, call and teardown."""
    if "failed" in phases.values():
        return "FAILED"
    if "teardown" not in phases:
        return "UNFINISHED"
    if "xfailed" in phases.values():
        return "XFAIL"
    if "xpassed" in phases.values():
        return "XPASS"
    return "PASSED" if phases.get("call") == "passed" else "SKIPPED"


def _run_printing(sandbox: LocalSandbox, parser: str, command: str, names: list[str], files: Files, touched: list[str],
                  timeout: float, log: list[str]) -> dict[str, str]:
    """Run a task's own test runner on the files of the test patch, and read its print with a parser of swebench's."""
    from swebench.harness.log_parsers import PARSER_REGISTRY  # late: it takes seconds

    arguments = " ".join(shlex.quote(path) for path in touched if path in files)
    log.append(f"$ {command} {arguments}")
    result = sandbox.execute(f"{command} {arguments}", timeout=timeout, output_limit=20_000_000)
    log += _printed(result, timeout)
    try:
        outcomes = dict(PARSER_REGISTRY[parser](result.output, None))
    except Exception as error:  # noqa: BLE001  what a program prints is anything, and they were not made for that
        log.append(f"{parser} cannot read this: {type(error).__name__}: {error}")
        return {}
    if result.exit_code and not {"FAILED", "ERROR"} & set(outcomes.values()):
        return {}  # as swebench: what was printed is not what happened
    return outcomes
