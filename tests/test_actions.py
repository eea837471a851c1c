"""One command out of a message, and what is answered."""

import pytest

from common import actions
from common.prompts import REMINDER


class Result:
    def __init__(self, exit_code=0, output="", timed_out=False, seconds=1.0):
        self.exit_code, self.output, self.timed_out, self.seconds = exit_code, output, timed_out, seconds


@pytest.mark.parametrize(
    "text, command",
    [
        ("Look.\n```bash\nls\n```", "ls"),
        ("```bash\nls\n```\nthen more words", "ls"),
        ("```bash\npython - <<'X'\nprint('```')\nX\n```", "python - <<'X'\nprint('```')\nX"),
        ("```bash  \n ls -l \n```  ", "ls -l"),
        ("two\n```bash\nls\n```\n```bash\npwd\n```", None),
        ("```bash\n\n```", None),
        ("```python\nprint()\n```", None),
        ("```bash\nls", None),
        ("ls", None),
        ("", None),
        # reasoning: a command in there is a thought
        ("<think>\n```bash\nrm -r .\n```\n</think>\n\n```bash\nls\n```", "ls"),
        ("<think>hm</think>```bash\nls\n```", "ls"),
        ("\n<think>\n```bash\nrm -r .\n```\n</think>\nDone.", None),
        ("<think>\n```bash\nrm -r .\n```\nand", None),  # cut off while thinking
        ("<think>a</think>\n```bash\ngrep '</think>' x\n```", "grep '</think>' x"),
        ("I could\n```bash\nrm -r .\n```\nno\n</think>\n\n```bash\nls\n```", "ls"),  # <think> was in the prompt
        ("Look.\n```bash\ngrep -rn '</think>' .\n```", "grep -rn '</think>' ."),
        ("Hm.\n```bash\nrm -r .\nno end\n</think>\nNow.\n```bash\npytest\n```\n", "pytest"),  # a thought's block, not closed
        ("Mind the <think> tag.\n```bash\nls\n```", "ls"),
    ],
)
def test_parse(text, command):
    assert actions.parse(text) == command


def test_observe():
    assert actions.observe(Result(0, "a\nb\n")) == "exit 0\na\nb"
    assert actions.observe(Result(1, "")) == "exit 1"
    assert actions.observe(Result(137, "x", timed_out=True, seconds=20.1)) == "exit 137\nx\n(killed after 20 s)"


def test_what_is_no_good_action():
    good = "Go.\n```bash\nls\n```"
    assert actions.wrong_with(good, "stop") is None
    assert actions.wrong_with(good, "length") == "cut off"
    assert actions.wrong_with(" \n", "stop") == "empty"
    assert actions.wrong_with("no block", "stop") == "not exactly one command"
    assert "```bash" in REMINDER
