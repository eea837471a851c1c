"""Why a task is not resolved: exactly one failure mode for each unresolved task, None for a resolved one.

The first that fits, in this order. The kinds are the paper's; the definitions are ours.

The episode did not end by submitting (whatever its patch is worth):
* format_limit: it ended after several turns in a row without a command.
* repeated_command: it ended at another limit, and its last commands go in a circle: one command three times in a row,
  or several gone through twice in the same order, up to the last one (A B A B, A B C A B C, ...). Equal means equal
  text, whatever was printed; a turn without a command is no part of a circle.
* turn_limit, context_limit, token_limit, time_limit: it came to that limit (of turns, tokens of context, generated tokens,
  seconds), and not in a circle.

It was submitted, or all that we have is a patch (--predictions):
* no_patch: nothing was changed.
* patch_not_applied: the patch does not apply to a clean checkout.
* broken_code: the edit breaks syntax or import. Either a Python file of the repository could be parsed before and no
  longer can (the local grader looks, with our Python's grammar); or there is a file with PASS_TO_PASS tests of which
  not one passes, and the log says that it could not be imported. FAIL_TO_PASS tests alone show nothing: they often
  import what the repair has yet to add.
* wrong_file: the patch changes none of the files that the gold patch changes.
* tests_failed: the right file, or one of them, and a test still fails; timeouts of the tests are here as well.

Logs hold what a patched program printed, so a program could choose between broken_code and the two below it. It cannot
change whether the task is resolved.
"""

import re

FAILURE_MODES = (
    "no_patch",
    "patch_not_applied",
    "broken_code",
    "wrong_file",
    "tests_failed",
    "repeated_command",
    "turn_limit",
    "context_limit",
    "token_limit",
    "time_limit",
    "format_limit",
)  # what was submitted comes first: the order for tables and colours

UNPARSED = "does not parse: "  # begins a line that the local grader puts at the head of its log
_HEAD = re.compile(r"patch applied\n(?:put back: .*\n)*" + UNPARSED)
_GIT = re.compile(r'^diff --git "?a/(?P<same>.+?)"? "?b/(?P=same)"?$|^(?:rename|copy) (?:from|to) (?P<moved>.+)$', re.M)
_PLAIN = re.compile(r'^--- "?([^\t\n]+?)"?(?:\t.*)?\r?\n\+\+\+ "?([^\t\n]+?)"?(?:\t.*)?\r?\n@@ ', re.M)
_SECTION = re.compile(r"^_+ ([^_\s].*?) _+$", re.M)  # pytest's headings: a test's name, or ERROR collecting PATH
_IMPORT = re.compile(  # what pytest and unittest say of a test file that they could not import
    r"^(?:E +|\w+: )?(?:SyntaxError|IndentationError|TabError|ImportError|ModuleNotFoundError)\b"
    r"|^(?:_+ )?ERROR (?:collecting )?[^\s:]+(?: - .*| _+)?$|^ImportError while ",
    re.M,
)


def failure_mode(row: dict, trajectory: dict | None, patch: str, verdict: dict) -> str | None:
    """The failure mode of one graded patch. row: the task; trajectory: None where there is a patch alone (the record
    of a prediction will do); verdict: what grading.grade or official.grade returned."""
    if verdict["resolved"]:
        return None
    end = (trajectory or {}).get("exit_status")
    if end not in (None, "submitted"):
        commands = [m["command"] for m in trajectory.get("messages", []) if m["role"] == "assistant"]
        return "repeated_command" if end != "format_limit" and goes_in_circles(commands) else end
    if not patch.strip():
        return "no_patch"
    if not verdict["patch_applied"]:
        return "patch_not_applied"
    if breaks_code(verdict):
        return "broken_code"
    if row.get("patch") and not files_of(row["patch"]) & files_of(patch):
        return "wrong_file"
    return "tests_failed"


def goes_in_circles(commands: list[str | None]) -> bool:
    """Whether the commands end with one command three times, or with several gone through twice in the same order."""
    for length in range(1, len(commands) // 2 + 1):
        times = 3 if length == 1 else 2
        tail = commands[-length * times :]
        if len(tail) == length * times and None not in tail and tail == tail[:length] * times:
            return True
    return False


def breaks_code(verdict: dict) -> bool:
    """Whether the patch breaks syntax or import: see broken_code in the module's docstring."""
    if _HEAD.match(verdict["log"]):
        return True
    log, status = verdict["log"], verdict["tests_status"]["PASS_TO_PASS"]
    of = {end: {name.split("::")[0] if "::" in name else "" for name in status[end]} for end in ("success", "failure")}
    lost = of["failure"] - of["success"]  # files, or "" for all tests whose names do not say
    return bool(lost) and any(_is_about(match, log, lost) for match in _IMPORT.finditer(log))


def _is_about(match: re.Match, log: str, lost: set[str]) -> bool:
    """Whether a line that tells of a failed import tells of one of the files `lost`."""
    line = match[0]
    if line.startswith("E ") and (heads := _SECTION.findall(log, 0, match.start())):  # pytest: under whose heading?
        line = heads[-1]
        if not line.startswith("ERROR "):  # a test that failed with an ImportError of its own
            return False
    return not line.startswith(("ERROR ", "_")) or any(path in line for path in lost)


def files_of(patch: str) -> set[str]:
    """The paths that a patch changes, from the headers of git or of plain diff; both names of what was renamed."""
    paths = {match["same"] or match["moved"].strip('"') for match in _GIT.finditer(patch)}
    for old, new in _PLAIN.findall(patch):
        paths |= {re.sub(r"^[ab]/", "", path) for path in (old, new) if path != "/dev/null"}
    return paths
