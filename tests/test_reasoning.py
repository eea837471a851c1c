"""Reasoning: kept apart from the text, or in it as it was generated; never a command, never half a label."""

import pytest

from common import actions, chat, openai_policy
from tests import tiny
from tests.servers import good
from tests.test_openai_policy import serve  # noqa: F401
from tests.test_policies import CHAT, act

DID = "\n\nLook.\n```bash\nls\n```"
THOUGHT = "\nI could run\n```bash\nrm -r .\n```\nbut no.\n"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_kept_apart(serve, name):  # noqa: F811
    _, policy = serve(good(DID, **{name: THOUGHT}))
    answer = act(policy)
    assert (answer.text, answer.reasoning) == (DID, THOUGHT)
    assert "keep_reasoning" not in policy.describe()


@pytest.mark.parametrize("generated", [f"<think>{THOUGHT}</think>{DID}", f"<think>{THOUGHT}</think>", "<think>hm"])
def test_kept_reasoning_is_the_text_as_generated(serve, generated):  # noqa: F811
    """Cut as vLLM's parser for Qwen3 does it: the first <think> goes, the text parts at the first </think>."""
    thought, end, said = generated.removeprefix("<think>").partition("</think>")
    _, policy = serve(good(said or None, "stop" if end else "length", reasoning=thought), keep_reasoning=True)
    answer = act(policy)
    assert (answer.text, answer.reasoning) == (generated, None)
    assert policy.describe()["keep_reasoning"] is True


def test_without_reasoning_nothing_is_put_into_the_text(serve):  # noqa: F811
    _, policy = serve(good(DID, reasoning=None, reasoning_content=""), keep_reasoning=True)
    assert (act(policy).text, act(policy).reasoning) == (DID, None)


def test_kept_reasoning_survives_rendering_and_is_no_command():
    text = openai_policy.rejoin(THOUGHT, DID, "stop")
    assert chat.harmless(text) == text
    assert actions.parse(text) == "ls"
    tokenizer = tiny.tokenizer("qwen3")
    ids, n_prompt = chat.sample(tokenizer, CHAT, text)
    assert tokenizer.decode(ids[n_prompt:]) == text + "<|im_end|>"


def test_think_tags_that_are_special_tokens_are_kept():
    tokenizer = tiny.tokenizer("qwen3")
    tokenizer.add_tokens(["<think>", "</think>", "<other>"], special_tokens=True)
    ids, n_prompt = chat.sample(tokenizer, CHAT, "<think>a <other></think>b")
    assert tokenizer.decode(ids[n_prompt:]) == "<think>a < other></think>b<|im_end|>"


def test_a_prompt_that_opens_the_block_gets_no_second_think():
    """Qwen3-Thinking: the generation prompt ends in <think>, and the model writes what comes after."""
    tokenizer = tiny.tokenizer("qwen3")
    before, opening, after = tokenizer.chat_template.rpartition("assistant\n'")
    tokenizer.chat_template = f"{before}assistant\n<think>\n'{after}"
    ids, n_prompt = chat.sample(tokenizer, CHAT, f"<think>{THOUGHT}</think>{DID}")
    assert tokenizer.decode(ids).endswith(f"assistant\n<think>{THOUGHT}</think>{DID}<|im_end|>")
    assert tokenizer.decode(ids[:n_prompt]).endswith("<think>\n")
    (made,) = chat.samples(tokenizer, CHAT, [(2, f"<think>{THOUGHT}</think>{DID}")])
    assert made[0].tolist() == ids and made[1] == n_prompt
