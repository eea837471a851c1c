"""Tokens: prompts are the chat template's, masks cover the label and its end of turn, text stays text."""

import copy
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import chat
from common.errors import InputError
from tests import tiny

KWARGS = {"qwen3": {"enable_thinking": False}}  # puts an empty think block into the generation prompt
CASES = [(name, KWARGS.get(name)) for name in tiny.TEMPLATES] + [("qwen3", None)]
WORDS = ["Find total.", "```bash\nls -la\n```", "exit 0\n./a.py:3:x", "  spaces  ", "ümlaut 漢字", "\n\n", "a", "submit\n",
         "<think>\nwhy\n</think>\n\nso", "2 < 3 |> f", "`x`", "</s> <s>", "[INST]"]


def conversation(seed: int, roles=("user",)) -> list[dict]:
    """A system prompt and an issue, then turns and observations; ends where an assistant turn comes next."""
    rng = random.Random(seed)

    def text():
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.7 else []
    messages.append({"role": "user", "content": text()})
    for turn in range(rng.randint(0, 5)):
        messages.append({"role": "assistant", "content": text(), "turn": turn, "actor": "student"})
        messages.append({"role": rng.choice(roles), "content": text(), "exit_code": 0})
    return messages


def plain(messages: list[dict], tokenizer) -> list[dict]:
    specials = chat.special_tokens(tokenizer)
    return [{"role": m["role"], "content": chat.harmless(m["content"], specials)} for m in messages]


@pytest.mark.parametrize("template, kwargs", CASES)
@pytest.mark.parametrize("seed", range(25))
def test_prompt_is_what_the_reference_renders(template, kwargs, seed):
    tokenizer = tiny.tokenizer(template)
    messages = conversation(seed, roles=("user", "tool") if template == "tools" else ("user",))
    text = tokenizer.apply_chat_template(plain(messages, tokenizer), tokenize=False, add_generation_prompt=True,
                                         **(kwargs or {}))
    assert chat.render(tokenizer, messages, kwargs) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template, kwargs", CASES)
@pytest.mark.parametrize("seed", range(10))
def test_all_states_of_a_conversation_at_once(template, kwargs, seed):
    """Tokenised piece by piece, each state has the ids that it has by itself."""
    tokenizer = tiny.tokenizer(template)
    messages = conversation(seed, roles=("user", "tool") if template == "tools" else ("user",))
    places = [place for place, m in enumerate(messages) if m["role"] == "assistant"] or [len(messages)]
    labels = [(place, WORDS[(seed + place) % len(WORDS)]) for place in places]
    found = [(ids.tolist(), n_prompt) for ids, n_prompt in chat.samples(tokenizer, messages, labels, kwargs)]
    assert found == [chat.sample(tokenizer, messages[:place], label, kwargs) for place, label in labels]


class PutsSomethingInFront:
    """As older SentencePiece tokenizers: a text that stands alone gets a token more than behind a special token."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, **how):
        ids = self.inner(text, **how)["input_ids"]
        return {"input_ids": ids if text.startswith("<|") else [7, *ids]}


def test_a_tokenizer_that_looks_across_special_tokens_is_given_the_whole_text():
    tokenizer = PutsSomethingInFront(tiny.tokenizer("chatml"))
    messages = [*conversation(3), {"role": "assistant", "content": "a b"}, {"role": "user", "content": "c"}] * 2
    labels = [(place, "label") for place, m in enumerate(messages) if m["role"] == "assistant"]
    found = [(ids.tolist(), n_prompt) for ids, n_prompt in chat.samples(tokenizer, messages, labels)]
    assert len(found) == 2
    assert found == [chat.sample(tokenizer, messages[:place], label) for place, label in labels]
    assert found[0][0][: found[0][1]] == chat.render(tokenizer.inner, messages[: labels[0][0]])


@pytest.mark.parametrize("template, kwargs", CASES)
def test_mask_covers_the_label_and_the_end_of_its_turn(template, kwargs):
    """Prompt, label, end: decoded each by itself, and put together they are what the template writes for that turn."""
    tokenizer = tiny.tokenizer(template)
    end = tiny.TEMPLATES[template][4]
    state = [{"role": "system", "content": "You repair."}, {"role": "user", "content": "total is wrong"}]
    label = "Find total.\n```bash\ngrep -rn 'def total' .\n```"
    ids, n_prompt = chat.sample(tokenizer, state, label, kwargs)
    assert tokenizer.decode(ids[n_prompt:-1]) == label
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == end
    assert ids[:n_prompt] == chat.render(tokenizer, state, kwargs)
    prompt = tokenizer.apply_chat_template(state, tokenize=False, add_generation_prompt=True, **(kwargs or {}))
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt + label + end
    said = tokenizer.apply_chat_template([*state, {"role": "assistant", "content": label}], tokenize=False,
                                         **(kwargs or {}))
    if template != "qwen3":  # that one writes a think block into the last turn whether or not there was thought
        assert said.startswith(prompt + label + end)


def test_label_is_not_glued_to_the_prompt():
    """The student gets the prompt's ids and goes on from there: a label that begins with a newline must not melt into
    the newline that ends the prompt, as it does where both are tokenised together."""
    tokenizer = tiny.tokenizer("llama3")
    state = [{"role": "user", "content": "a"}]
    for label in ("\nls", "\n\n", " ls", "ls"):
        ids, n_prompt = chat.sample(tokenizer, state, label)
        assert ids[:n_prompt] == chat.render(tokenizer, state)
        assert tokenizer.decode(ids[n_prompt:-1]) == label


@pytest.mark.parametrize("template, kwargs", CASES)
def test_empty_label_trains_the_end_of_turn_alone(template, kwargs):
    ids, n_prompt = chat.sample(tiny.tokenizer(template), [{"role": "user", "content": "a"}], "", kwargs)
    assert len(ids) - n_prompt == 1


def test_end_of_turn_by_template():
    for template, (*_, end) in tiny.TEMPLATES.items():
        tokenizer = tiny.tokenizer(template)
        assert chat.end_of_turn(tokenizer, KWARGS.get(template)) == [tokenizer.convert_tokens_to_ids(end)]


def test_end_of_turn_falls_back_to_eos():
    tokenizer = tiny.tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert chat.end_of_turn(tokenizer) == [tokenizer.eos_token_id]
    tokenizer = tiny.tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' .' + eos_token + '\n' }}{% endfor %}"
    assert tokenizer.decode(chat.end_of_turn(tokenizer)) == " ." + tokenizer.eos_token


def test_old_reasoning_is_dropped_from_prompts_but_trained_where_it_is_the_label():
    tokenizer = tiny.tokenizer("qwen3")
    thought = "<think>\nhm\n</think>\n\n```bash\nls\n```"
    old = [{"role": "user", "content": "a"}, {"role": "assistant", "content": thought}, {"role": "user", "content": "b"}]
    assert "hm" not in tokenizer.decode(chat.render(tokenizer, old))
    ids, n_prompt = chat.sample(tokenizer, old[:1], thought)
    assert tokenizer.decode(ids[n_prompt:-1]) == thought


@pytest.mark.parametrize("text, inert", [
    ("<|im_end|>", "<| im_end |>"),
    ("x <|eot_id|><|a b|> y", "x <| eot_id |><| a b |> y"),
    ("<\uff5cEnd\uff5c>", "<\uff5c End \uff5c>"),
    ("</s> [INST]", "</s> [INST]"),  # ordinary text, unless a tokenizer says otherwise
    ("f <| x |> g, a <|> b, <||>", "f <| x |> g, a <|> b, <||>"),
])
def test_harmless(text, inert):
    assert chat.harmless(text) == inert
    assert chat.harmless(inert) == inert


def test_harmless_with_the_tokens_of_a_tokenizer():
    assert chat.harmless("a</s>b<s>", ["<s>", "</s>"]) == "a< /s>b< s>"
    assert chat.harmless("<<s>s>", ["<s>"]) == "<< s>s>"
    assert chat.harmless("a\u2581b", ["\u2581"]) == "aU+2581b"


pieces = st.one_of(st.text(max_size=6), st.sampled_from(
    ["<", "|", ">", "<|", "|>", "<s>", "</s>", " ", "\n", "im_end", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|end|>",
     "<|begin_of_text|>", "<|start_header_id|>", "<|tool|>", "<|endoftext|>", "user", "assistant"]))


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, max_size=8).map("".join), st.sampled_from(sorted(tiny.TEMPLATES)))
def test_no_text_becomes_a_special_id(text, template):
    tokenizer = tiny.tokenizer(template)
    specials = chat.special_tokens(tokenizer)
    inert = chat.harmless(text, specials)
    assert chat.harmless(inert, specials) == inert
    assert not set(chat.encode(tokenizer, inert)) & set(tokenizer.all_special_ids)
    # nor inside a prompt: the special ids there are those of a prompt with plain words in the same places
    prompt = chat.render(tokenizer, [{"role": "user", "content": text}])
    usual = chat.render(tokenizer, [{"role": "user", "content": "x"}])
    special = set(tokenizer.all_special_ids)
    assert [i for i in prompt if i in special] == [i for i in usual if i in special]


def test_no_space_is_put_before_a_label():
    """Older SentencePiece tokenizers put a space before a text that stands alone; in a conversation none is there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(["<s>", "</s>", "\u2581", "x", "l", "s"])}
    made = Tokenizer(models.BPE(letters, [], unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    assert tokenizer("ls", add_special_tokens=False)["input_ids"] == [2, 4, 5]
    assert chat.encode(tokenizer, "ls") == [4, 5]


def test_bad_input_is_named():
    tokenizer = tiny.tokenizer("tools")
    with pytest.raises(InputError, match="unknown role oracle.*user oracle"):
        chat.render(tokenizer, [{"role": "user", "content": "a"}, {"role": "oracle", "content": "b"}])
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        chat.render(tokenizer, [{"role": "user", "content": "a"}])


def test_show_marks_what_is_trained(capsys):
    tokenizer = tiny.tokenizer("chatml")
    ids, n_prompt = chat.sample(tokenizer, [{"role": "user", "content": "wrong total"}], "Look.")
    chat.show(tokenizer, ids, n_prompt)
    printed = capsys.readouterr().err
    assert "wrong total<|im_end|>\n<|im_start|>assistant\n>>>Look.<|im_end|><<<" in printed
    assert f"({n_prompt} prompt tokens, {len(ids) - n_prompt} trained tokens)" in printed


def test_what_was_generated_keeps_its_thought_and_loses_other_special_tokens():
    """Some tokenizers flag <think> as special; a command inside a thought must not become a command of its own."""
    tokenizer = copy.deepcopy(tiny.tokenizer("qwen3"))
    ids = tokenizer("<think>\nhm\n</think>\nls<|im_end|>", add_special_tokens=False)["input_ids"]
    assert chat.text_of(tokenizer, ids) == "<think>\nhm\n</think>\nls"
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    tokenizer = copy.deepcopy(tokenizer)
    ids = tokenizer("<think>\nhm\n</think>\nls<|im_end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    assert chat.text_of(tokenizer, ids) == "<think>\nhm\n</think>\nls"


def test_today_is_the_same_day_for_acting_and_for_training(capsys):
    tokenizer = tiny.tokenizer("chatml")
    tokenizer.chat_template = "{{ 'Today: ' + strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    ids = chat.render(tokenizer, [{"role": "user", "content": "a"}])
    assert "26 Jul 2024" in tokenizer.decode(ids) and "prints today's date" in capsys.readouterr().err
    ((sample, n_prompt),) = chat.samples(tokenizer, [{"role": "user", "content": "a"}], [(1, "b")])
    assert sample[:n_prompt].tolist() == ids
