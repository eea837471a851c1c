"""The turn loop: ask, parse, execute, observe, stop. Who is asked at a turn is the caller's idea, not this module's.

The conversation is a plain chat list: system prompt, problem statement, then assistant turns and observations (role
`user`) in alternation. What was sent is what is stored; a policy sees role and content alone.
"""

import contextlib
import functools
import os
import shutil
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from typing import Callable, Literal

from common import actions, prompts, sandbox, schema
from common.chat import harmless
from common.errors import InfraError

FORMAT_LIMIT = 5  # turns in a row without a command


@dataclass(kw_only=True)
class AgentFlags:
    """The agent flags of 01_collect.py and 04_eval.py. The defaults fit the embedded student and tasks."""

    max_turns: int = 12
    """turns after which a trajectory ends as turn_limit"""
    max_context: int = 2048
    """tokens of conversation and answer after which a trajectory ends as context_limit"""
    max_tokens: int = 8192
    """tokens generated in all after which a trajectory ends as token_limit"""
    max_new_tokens: int = 64
    """tokens that one turn may take"""
    time_limit: float = 600.0
    """seconds of answers and commands after which a trajectory ends as time_limit (waiting for the model, a place
    in its batch or at its server, another try or a slot does not count)"""
    command_timeout: float = 20.0
    """seconds that one command may take"""
    slots: int = 2 * (os.cpu_count() or 1)
    """commands at once, however many workers there are; patches and starts of local sandboxes count too"""
    sandbox: Literal["auto", "docker", "local"] = "auto"
    """where commands run: local is bubblewrap, for tasks with `local`; docker a container of the task's image"""
    network: bool = False
    """let containers reach the network"""
    check_images: bool = False
    """first list the images that are neither here nor in their registry"""
    evict_images: bool = False
    """when the disk is nearly full, remove images that were pulled here and are not in use"""

    def limits(self) -> dict:
        """What of these makes it the same work (run.Stage)."""
        names = ("max_turns", "max_context", "max_tokens", "max_new_tokens", "time_limit", "command_timeout")
        return {name: getattr(self, name) for name in names} | ({"network": True} if self.network else {})


@functools.cache
def _slots(number: int) -> threading.BoundedSemaphore:
    """What a command holds while it runs: 512 test runs at once on 16 cores would all reach their timeout."""
    return threading.BoundedSemaphore(number)


def rollout(
    row: dict,
    box,
    ask: Callable[[int, list[dict]], tuple],
    flags: AgentFlags,
    watch: Callable[[dict], None] = lambda message: None,
    count: Callable[[str], int | None] = lambda text: None,
) -> dict:
    """Run one episode in the started sandbox `box`. `ask(turn, chat)` returns (actor, policies.Answer); `watch` sees each
    message as it is stored; `count` gives the tokens of a turn where the answer does not.

    Returns {"messages", "exit_status", "patch"}. The patch is the difference of the tree to base_commit however the
    episode ended. Raises InfraError, with what there was in its attribute `record`, where engine or service failed.
    """
    from common.policies import ContextLimit

    messages: list[dict] = []

    def store(message: dict) -> None:
        messages.append(message)
        watch(message)

    for message in prompts.opening(row):
        store(message | {"content": harmless(message["content"])})
    slots = _slots(flags.slots)
    spent, generated, without_command = 0.0, 0, 0  # seconds, tokens, turns in a row
    status = "turn_limit"
    try:
        for turn in range(flags.max_turns):
            try:
                actor, answer = ask(turn, [{"role": m["role"], "content": m["content"]} for m in messages])
            except ContextLimit:
                status = "context_limit"
                break
            spent += answer.seconds
            text = harmless(answer.text)
            command = actions.parse(text)
            tokens_out = count(text) if answer.tokens_out is None else answer.tokens_out
            store(
                {
                    "role": "assistant",
                    "content": text,
                    "turn": turn,
                    "actor": actor,
                    "command": command,
                    "finish_reason": answer.finish_reason,
                    "tokens": {"in": answer.tokens_in, "cached": answer.tokens_cached, "out": tokens_out},
                    "seconds": round(answer.seconds, 3),
                    "logprob": answer.logprob,
                }
                | ({"reasoning": answer.reasoning} if answer.reasoning else {})
            )
            if command == actions.SUBMIT:
                status = "submitted"
                break
            without_command = 0 if command else without_command + 1
            if command:
                with slots:
                    result = box.run(command)
                spent += result.seconds
                store(
                    {
                        "role": "user",
                        "content": harmless(actions.observe(result)),
                        "exit_code": result.exit_code,
                        "seconds": round(result.seconds, 3),
                        "truncated": result.truncated,
                    }
                )
            else:
                store(
                    {
                        "role": "user",
                        "content": prompts.REMINDER,
                        "exit_code": None,
                        "seconds": 0.0,
                        "truncated": False,
                    }
                )
            generated += tokens_out or 0
            if without_command >= FORMAT_LIMIT:
                status = "format_limit"
                break
            if generated >= flags.max_tokens:
                status = "token_limit"
                break
            if spent >= flags.time_limit:
                status = "time_limit"
                break
        with slots:
            return {"messages": messages, "exit_status": status, "patch": box.diff()}
    except InfraError as error:
        error.record = {"messages": messages, "exit_status": "infra_error", "patch": "", "error": str(error)}
        raise


def trajectory(
    row: dict,
    head: dict,
    ask: Callable[[int, list[dict]], tuple],
    flags: AgentFlags,
    count: Callable[[str], int],
    watch: Callable[[dict], None] = lambda message: None,
) -> dict:
    """One record of a trajectories file: `head` (who, where, which seed), then an episode in a sandbox of its own.

    `watch`, `count` and InfraError as in `rollout`; the error has the record.
    """
    started = time.time()
    record = {
        "schema": schema.VERSION,
        "trajectory_id": f"{row['instance_id']}.i{head['iteration']}.a{head['attempt']}",
        "instance_id": row["instance_id"],
        "base_commit": row["base_commit"],
        **head,
        "prompt": prompts.version(row),
        "limits": flags.limits(),
    }
    try:
        with contextlib.ExitStack() as stack:
            # A container may wait for its image for minutes, and starts have a limit of their own.
            docker = sandbox.kind_of(row, flags.sandbox) == "docker"
            with contextlib.nullcontext() if docker else _slots(flags.slots):
                box = stack.enter_context(
                    sandbox.open_sandbox(row, flags.sandbox, flags.command_timeout, network=flags.network,
                                         trajectory=record["trajectory_id"]))  # fmt: skip
            record |= rollout(row, box, ask, flags, watch, count)
    except InfraError as error:
        error.record = record | getattr(error, "record", {"messages": [], "exit_status": "infra_error", "patch": ""})
        raise
    return record | {"usage": usage(record["messages"]), "started": started, "finished": time.time()}


def usage(messages: list[dict]) -> dict:
    """What each actor's turns took: {"teacher": {"turns", "in", "cached", "out" (tokens), "seconds"}, "student": ...}."""
    sums: dict[str, dict] = {}
    for message in messages:
        if message["role"] == "assistant":
            of = sums.setdefault(message["actor"], {"turns": 0, "in": 0, "cached": 0, "out": 0, "seconds": 0.0})
            of["turns"] += 1
            of["seconds"] = round(of["seconds"] + message["seconds"], 3)
            for kind in ("in", "cached", "out"):
                of[kind] += message["tokens"][kind] or 0
    return sums


class Show:
    """Print a trajectory while it happens: who acts, the thought, the command, what came back."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.colour = self.stream.isatty()

    def __call__(self, message: dict) -> None:
        if message["role"] == "system":
            return
        if message["role"] == "user":
            opening = "exit_code" not in message
            self._print(message["content"], "" if opening else "2", "  " if opening else "    ", cap=None if opening else 14)
            self._rule() if opening else None
            return
        actor = message["actor"]
        tint = "36" if actor == "teacher" else "33"
        print(self._paint(f"{message['turn']:>2}  {actor}", f"1;{tint}"), file=self.stream)
        thought = message["content"].split("```bash")[0].strip() or "(no words)"
        self._print(thought, tint, "    ", cap=8)
        if message["command"]:
            self._print("$ " + message["command"].replace("\n", "\n  "), "1", "    ", cap=14)
        self.stream.flush()

    def title(self, text: str) -> None:
        print(self._paint(text, "1"), file=self.stream)
        self._rule()

    def result(self, text: str, good: bool | None = None) -> None:
        self._rule()
        print(self._paint(text, {True: "1;32", False: "1;31", None: "1"}[good]) + "\n", file=self.stream, flush=True)

    def _rule(self) -> None:
        print(self._paint("─" * min(72, shutil.get_terminal_size().columns - 1), "2"), file=self.stream)

    def _print(self, text: str, code: str, indent: str, cap: int | None) -> None:
        width = max(40, shutil.get_terminal_size().columns - len(indent) - 1)
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]]
        if cap and len(lines) > cap:
            lines = lines[: cap - 3] + [f"… {len(lines) - cap + 1} lines …"] + lines[-2:]
        for line in lines:
            # A hostile command may print escape sequences: only what can be read reaches the terminal.
            plain = "".join(char if char.isprintable() or char == "\t" else "·" for char in line)
            print(indent + self._paint(plain, code), file=self.stream)

    def _paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour and code else text
