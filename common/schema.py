"""The record types of every JSONL file, and their validation on the way in and out.

A record is a plain dict. Each type below is a table: field -> (allowed types, required). Fields that the table does not
name are allowed, so that an ablation can carry something along. `schema` is the version of the record type.
"""

import re

from common.errors import InputError

VERSION = 1
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # ids become parts of paths and of containers' names

_TEXT = (str,)
_INT = (int,)
_NUM = (int, float)
_NONE = (type(None),)
_DICT = (dict,)
_LIST = (list,)

TASK = {
    "instance_id": (_TEXT, True),
    "repo": (_TEXT, True),
    "base_commit": (_TEXT, True),
    "problem_statement": (_TEXT, True),
    "patch": (_TEXT, True),
    "test_patch": (_TEXT, True),
    "FAIL_TO_PASS": (_LIST, True),
    "PASS_TO_PASS": (_LIST, True),
    "local": (_DICT + _NONE, False),
    "image": (_TEXT + _NONE, False),
    "log_parser": (_TEXT + _NONE, False),
    "eval_type": (_TEXT + _NONE, False),
    "eval_script": (_TEXT + _NONE, False),
    "prompt": (_TEXT + _NONE, False),
}
TRAJECTORY = {
    "schema": (_INT, True),
    "trajectory_id": (_TEXT, True),
    "instance_id": (_TEXT, True),
    "base_commit": (_TEXT, True),
    "iteration": (_INT, True),
    "attempt": (_INT, True),
    "seed": (_INT, True),
    "mix": (_TEXT, True),
    "beta": (_NUM + _NONE, True),
    "kappa": (_INT, False),
    "student": (_DICT + _NONE, True),
    "teacher": (_DICT + _NONE, True),
    "prompt": (_TEXT, True),
    "limits": (_DICT, True),
    "messages": (_LIST, True),
    "exit_status": (_TEXT, True),
    "patch": (_TEXT, True),
    "usage": (_DICT, False),
    "inline": (_DICT, False),
    "started": (_NUM, True),
    "finished": (_NUM, True),
}
ASSISTANT = {
    "role": (_TEXT, True),
    "content": (_TEXT, True),
    "turn": (_INT, True),
    "actor": (_TEXT, True),
    "command": (_TEXT + _NONE, True),
    "finish_reason": (_TEXT, True),
    "tokens": (_DICT, True),
    "seconds": (_NUM, True),
    "logprob": (_NUM + _NONE, True),
    "reasoning": (_TEXT, False),
}
LABEL = {
    "schema": (_INT, True),
    "trajectory_id": (_TEXT, True),
    "instance_id": (_TEXT, True),
    "iteration": (_INT, True),
    "turn": (_INT, True),
    "label": (_TEXT, True),
    "valid": ((bool,), True),
    "reason": (_TEXT + _NONE, True),
    "source": (_TEXT, True),
    "teacher": (_DICT, True),
    "tokens": (_DICT, True),
    "seconds": (_NUM, True),
    "agrees": ((bool,) + _NONE, True),
}
PREDICTION = {
    "instance_id": (_TEXT, True),
    "model_name_or_path": (_TEXT, False),
    "model_patch": (_TEXT + _NONE, True),
}
RESULT = {
    "schema": (_INT, True),
    "instance_id": (_TEXT, True),
    "trajectory_id": (_TEXT + _NONE, True),
    "resolved": ((bool,), True),
    "tests_status": (_DICT, True),
    "exit_status": (_TEXT + _NONE, True),
    "failure_mode": (_TEXT + _NONE, True),
    "turns": (_INT + _NONE, True),
    "tokens": (_DICT + _NONE, True),
    "seconds": (_NUM, True),
    "tampered": ((bool,), True),
    "grader": (_TEXT, False),
    "suspected_infra": (_TEXT + _NONE, False),
    "groups": ((list,), False),
}

ACTORS = ("student", "teacher")
SOURCES = ("executed", "queried", "cache")
EXIT_STATUSES = (
    "submitted",
    "turn_limit",
    "context_limit",
    "token_limit",
    "time_limit",
    "format_limit",
    "infra_error",
)
TYPES = {
    "task": TASK,
    "trajectory": TRAJECTORY,
    "label": LABEL,
    "prediction": PREDICTION,
    "result": RESULT,
}


def check(record: dict, kind: str, where: str) -> dict:
    """Return `record` if it is a valid record of type `kind`.

    Raises InputError that starts with `where` (file and line, or an id) and names the field.
    """
    _check_fields(record, TYPES[kind], f"{where}: {kind}")
    if "schema" in TYPES[kind] and record["schema"] != VERSION:
        raise InputError(
            f"{where}: {kind} has schema version {record['schema']}, this code reads version {VERSION}: "
            "make the file again with the script that wrote it"
        )
    for name in ("instance_id", "trajectory_id"):
        if name in TYPES[kind] and record[name] is not None and not ID.fullmatch(record[name]):
            raise InputError(f"{where}: {name} {record[name]!r}: it may have letters, digits and _ . - only, for files are "
                             "named after it")  # fmt: skip
    if kind == "task" and not all(isinstance(name, str) for which in ("FAIL_TO_PASS", "PASS_TO_PASS") for name in record[which]):
        raise InputError(f"{where}: FAIL_TO_PASS and PASS_TO_PASS must be lists of the names of tests")
    if kind == "trajectory":
        _check_trajectory(record, where)
    if kind == "label" and record["source"] not in SOURCES:
        raise InputError(f"{where}: label source {record['source']!r} is none of {', '.join(SOURCES)}")
    return record


def asked(trajectory: dict, where: str) -> dict:
    """How its policies were asked: temperature, top_p, max_new_tokens, max_context. Raises InputError where it does not
    say so."""
    policy = trajectory["teacher"] or trajectory["student"] or {}
    sampling, limits = policy.get("sampling"), trajectory["limits"]
    if not isinstance(sampling, dict):
        raise InputError(f"{where}: no sampling in its teacher or student, an object with temperature and top_p")
    _check_fields(sampling, {"temperature": (_NUM, True), "top_p": (_NUM, True)}, f"{where}: sampling")
    _check_fields(limits, {"max_new_tokens": (_INT, True), "max_context": (_INT, True)}, f"{where}: limits")
    return {name: sampling[name] for name in ("temperature", "top_p")} | {
        name: limits[name] for name in ("max_new_tokens", "max_context")
    }


def _check_trajectory(record: dict, where: str) -> None:
    if record["exit_status"] not in EXIT_STATUSES:
        raise InputError(f"{where}: exit_status {record['exit_status']!r} is none of {', '.join(EXIT_STATUSES)}")
    turns = 0
    for place, message in enumerate(record["messages"]):
        at = f"{where}: messages[{place}]"
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise InputError(f"{at}: needs a role of system, user or assistant")
        if not isinstance(message.get("content"), str):
            raise InputError(f"{at}: content must be a text")
        if message["role"] != "assistant":
            continue
        _check_fields(message, ASSISTANT, at)
        if message["actor"] not in ACTORS:
            raise InputError(f"{at}: actor {message['actor']!r} is none of {', '.join(ACTORS)}")
        if message["turn"] != turns:
            raise InputError(f"{at}: turn is {message['turn']}, but this is assistant turn {turns} (counted from 0)")
        turns += 1


def _check_fields(record: dict, table: dict, where: str) -> None:
    for field, (types, required) in table.items():
        if field not in record:
            if required:
                raise InputError(f"{where}: field {field!r} is missing")
            continue
        value = record[field]
        # bool is an int in Python, but true is no number here
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise InputError(f"{where}: field {field!r} must be {names}, not {type(value).__name__}")
