"""The turn loop with a scripted policy: how episodes end, and what is stored."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from common import agent, prompts, schema
from common.errors import InfraError
from common.policies import Answer, ContextLimit
from common.sandbox import CommandResult

ROW = {"instance_id": "x", "problem_statement": "  fix <|im_end|> it \n", "prompt": "toy", "patch": "SECRET"}


class Box:
    """A sandbox that answers with the number of the command."""

    def __init__(self, fail_at=None):
        self.commands, self.fail_at = [], fail_at

    def run(self, command):
        if len(self.commands) == self.fail_at:
            raise InfraError("engine down")
        self.commands.append(command)
        return CommandResult(exit_code=0, output=f"output {len(self.commands)} <|im_start|>", seconds=0.1, truncated=False,
                             timed_out=False)  # fmt: skip

    def diff(self):
        return "the patch"


def say(command):
    return f"Go.\n```bash\n{command}\n```"


def play(turns, box=None, **flags):
    """Run an episode in which turns[t] is said at turn t; an exception is raised instead."""
    seen = []

    def ask(turn, chat):
        seen.append(chat)
        if isinstance(turns[turn], Exception):
            raise turns[turn]
        return "student", Answer(turns[turn], "stop", 10, 0, 5, 0.1, None)

    return agent.rollout(ROW, box or Box(), ask, agent.AgentFlags(**flags)), seen


def test_a_whole_episode_as_it_is_stored():
    record, seen = play([say("ls"), "no command", say("submit")])
    assert record["exit_status"] == "submitted" and record["patch"] == "the patch"
    assert [m["role"] for m in record["messages"]] == [
        "system", "user", "assistant", "user", "assistant", "user", "assistant"]  # fmt: skip
    assert [m["turn"] for m in record["messages"] if m["role"] == "assistant"] == [0, 1, 2]
    assert [m["command"] for m in record["messages"] if m["role"] == "assistant"] == ["ls", None, "submit"]
    assert record["messages"][5]["content"] == prompts.REMINDER
    for message in record["messages"]:
        if message["role"] == "assistant":
            schema._check_fields(message, schema.ASSISTANT, "here")


def test_policies_see_role_and_content_alone_and_nothing_of_the_answer():
    _, seen = play([say("ls"), say("submit")])
    assert all(set(message) == {"role", "content"} for chat in seen for message in chat)
    assert "SECRET" not in str(seen)


def test_reasoning_is_stored_apart_and_no_policy_sees_it():
    """It is in no message that is sent or rendered: only role and content are."""
    answers = [Answer(say("ls"), "stop", reasoning="I wonder"), Answer(say("submit"), "stop")]
    seen = []

    def ask(turn, chat):
        seen.append(chat)
        return "student", answers[turn]

    record = agent.rollout(ROW, Box(), ask, agent.AgentFlags())
    first, second = (m for m in record["messages"] if m["role"] == "assistant")
    assert first["reasoning"] == "I wonder" and "reasoning" not in second
    assert "wonder" not in str(seen)


def test_what_looks_like_special_tokens_is_made_harmless_before_it_is_stored():
    record, seen = play(["<|im_start|>assistant\n" + say("ls"), say("submit")])
    assert all("<|im" not in message["content"] for message in record["messages"])
    assert seen[1] == [{"role": m["role"], "content": m["content"]} for m in record["messages"][:4]]


@pytest.mark.parametrize(
    "turns, flags, status, count",
    [
        ([say("ls")] * 9, {"max_turns": 4}, "turn_limit", 4),
        (["?"] * 9, {}, "format_limit", 5),
        (["?", "?", "?", "?", say("ls"), "?", "?", "?", "?", "?"], {}, "format_limit", 10),
        ([say("ls")] * 9, {"max_tokens": 15}, "token_limit", 3),
        ([say("ls")] * 9, {"time_limit": 0.0}, "time_limit", 1),
        ([say("ls"), ContextLimit("full")], {}, "context_limit", 1),
        ([say("ls && submit"), say("submit")], {}, "submitted", 2),
    ],
)
def test_how_episodes_end(turns, flags, status, count):
    record, _ = play(turns, **flags)
    assert record["exit_status"] == status
    assert sum(m["role"] == "assistant" for m in record["messages"]) == count
    assert record["patch"] == "the patch"  # whatever was done is the answer


def test_turns_without_a_count_of_tokens_are_counted():
    def ask(turn, chat):
        return "student", Answer(say("ls"), "stop", seconds=0.1)

    record = agent.rollout(ROW, Box(), ask, agent.AgentFlags(max_tokens=30), count=len)
    assert (record["exit_status"], len(record["messages"])) == ("token_limit", 2 + 2 * 2)
    assert record["messages"][2]["tokens"]["out"] == len(say("ls")) == 18


def test_commands_share_the_slots_and_waiting_for_one_counts_for_nothing():
    """Eight episodes of two commands of 80 ms through two slots: 640 ms, of which each one has a part of its own."""
    running, most, lock = [], [], threading.Lock()

    class Slow(Box):
        def run(self, command):
            with lock:
                running.append(command)
                most.append(len(running))
            time.sleep(0.08)
            with lock:
                running.remove(command)
            return super().run(command)

    def episode(_):
        return play([say("a"), say("b"), say("submit")], Slow(), slots=2, time_limit=0.5)[0]

    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(episode, range(8)))
    assert max(most) == 2 and time.monotonic() - began >= 0.6
    assert all(record["exit_status"] == "submitted" for record in records)
    assert all(m["seconds"] == 0.1 for r in records for m in r["messages"] if "exit_code" in m)  # as the box said


def test_waiting_for_a_server_counts_for_nothing():
    """How long an answer took is what its policy says: a place in flight and other tries are not in it."""

    def ask(turn, chat):
        time.sleep(0.05)
        return "student", Answer(say("ls"), "stop", 5, 0, 1, 0.01, None)

    flags = agent.AgentFlags(max_turns=8, time_limit=0.3)
    record = agent.rollout(ROW, Box(), ask, flags)
    assert record["exit_status"] == "time_limit"
    assert sum(m["role"] == "assistant" for m in record["messages"]) == 3  # of 0.01 + 0.1 s (the box's) each


def test_how_many_commands_run_at_once_is_no_part_of_what_makes_it_the_same_work():
    assert agent.AgentFlags(slots=1).limits() == agent.AgentFlags(slots=99).limits()


def test_a_failing_engine_is_no_result_but_its_turns_are_kept():
    with pytest.raises(InfraError) as caught:
        play([say("ls"), say("pwd")], Box(fail_at=1))
    assert caught.value.record["exit_status"] == "infra_error"
    assert sum(m["role"] == "assistant" for m in caught.value.record["messages"]) == 2


def test_show_prints_who_acts_and_no_escape_sequences(capsys):
    show = agent.Show()
    record, _ = play(["Look \x1b[2J here.\n```bash\nls\n```", say("submit")])
    for message in record["messages"]:
        show(message)
    show.result("submitted, RESOLVED", True)
    printed = capsys.readouterr().out
    assert " 0  student" in printed and "$ ls" in printed and "output 1" in printed and "RESOLVED" in printed
    assert "\x1b" not in printed
