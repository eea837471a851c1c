"""One action is one assistant turn: free reasoning and one command in a fenced bash block. Parse it, answer it."""

import re

_BLOCK = re.compile(r"^```bash[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
SUBMIT = "submit"
THINK, END_THINK = "<think>", "</think>"


def said(text: str) -> str:
    """`text` without the reasoning between <think> and </think> that it begins with: commands in there are thoughts.

    A chat template may have opened the block itself, then only </think> is there. But where no <think> begins the
    text, a </think> inside a ```bash block belongs to the command.
    """
    if text.lstrip().startswith(THINK):
        return text.partition(END_THINK)[2]  # nothing, if it was cut off while thinking
    # A block with another one's first line in it is two: a thought's that was not closed, and what was said.
    blocks = [match.span() for match in _BLOCK.finditer(text) if "\n```bash" not in match[0]]
    for end in re.finditer(END_THINK, text):
        if not any(start < end.start() < stop for start, stop in blocks):
            return text[end.end() :]
    return text


def parse(text: str) -> str | None:
    """The command of the one ```bash block in what `text` says; None if there is no block, several, or an empty one."""
    blocks = _BLOCK.findall(said(text))
    if len(blocks) != 1:
        return None
    return blocks[0].strip() or None


def observe(result) -> str:
    """The observation of a sandbox.CommandResult: a line with the exit code, then the output."""
    text = f"exit {result.exit_code}\n{result.output}".rstrip()
    return f"{text}\n(killed after {result.seconds:.0f} s)" if result.timed_out else text


def wrong_with(text: str, finish_reason: str) -> str | None:
    """Why `text` is no good action to learn from; None if it is one."""
    if finish_reason == "length":
        return "cut off"
    if finish_reason == "content_filter":
        return "stopped by the server's content filter"
    if not text.strip():
        return "empty"
    if parse(text) is None:
        return "not exactly one command"
    return None
