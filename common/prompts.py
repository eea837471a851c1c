"""The prompts, each with a version. A task row chooses by its field `prompt`; `swe` is the default.

Change a text, change its version: the version is recorded with every trajectory, and a run does not mix two.
"""

from common.errors import InputError

REMINDER = "Reply with one command in a ```bash block."

_SWE = """You are a software engineer who repairs a repository. It is checked out at /testbed.

Each reply holds a short thought and exactly one command in a fenced block:

```bash
grep -rn "def parse" src
```

Every command runs in a fresh bash that starts in /testbed: `cd` and variables do not last. You see its exit code and
its output; long output is cut in the middle. No command can ask for input.

Find the cause, change the source (not the tests), and run what shows that it works. When you are done, reply with the
command `submit` alone: the difference between your tree and the original commit is your answer."""

PROMPTS = {
    "toy": ("toy-1", "Fix the bug in the repository. One bash command per reply. `submit` ends."),
    "swe": ("swe-1", _SWE),
}


def version(row: dict) -> str:
    return _pick(row)[0]


def opening(row: dict) -> list[dict]:
    """The messages before the first turn: the system prompt and the problem statement, and nothing else of the row."""
    return [
        {"role": "system", "content": _pick(row)[1]},
        {"role": "user", "content": row["problem_statement"].strip()},
    ]


def _pick(row: dict) -> tuple[str, str]:
    name = row.get("prompt") or "swe"
    if name not in PROMPTS:
        raise InputError(f"{row['instance_id']}: field 'prompt' is {name!r}, none of {', '.join(PROMPTS)}")
    return PROMPTS[name]
