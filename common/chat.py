"""From messages to tokens: the one place where conversations are rendered, for acting and for training alike.

A prompt is what the model's own chat template renders for generation, and nothing but role and content enters it.
A training sample is that prompt, then the label's tokens, then the token that ends the turn: exactly the ids that the
student would have produced had it acted as the teacher did. The label is tokenised by itself, never together with
the prompt's last characters, because that is how generation sees it.

A template that asks for today's date gets DATE: else a conversation would be rendered otherwise on the day it is trained
on than on the day it was made. A server has its own calendar; where a template takes one, `date_string` among the
chat_template_kwargs fixes the date there, too.

What this does not do: it knows no tools and no images, and it does not repair roles that a template refuses.
"""

import datetime
import functools
import json
import os
import re
import sys
from typing import Any, Iterable, Iterator, TextIO
from weakref import WeakKeyDictionary

from common.errors import InputError

# "<|im_end|>", "<|eot_id|>", and the full-width bars of some models. Tokens of other shapes ("</s>", "[INST]") are
# ordinary text in many programs, so they are touched only where a tokenizer says that they are special.
SPECIAL_LOOK = r"<[|\uff5c][^\s<>|\uff5c](?:[^<>|\uff5c\n]{0,62}[^\s<>|\uff5c])?[|\uff5c]>"

DATE = datetime.date(2024, 7, 26)  # what Llama's templates print where they know of no clock

THINK = ("<think>", "</think>")  # are kept as they are even where a tokenizer calls them special: labels hold them

_cache: "WeakKeyDictionary[Any, dict]" = WeakKeyDictionary()  # tokenizer -> what was found out about it


def harmless(text: str, specials: Iterable[str] = ()) -> str:
    """`text` with everything that looks like a special token made inert, visibly: "<|im_end|>" -> "<| im_end |>".

    `specials` are exact tokens besides the general look, as `special_tokens` lists them: "</s>" -> "< /s>".
    Text that holds none comes back as it is, so doing it twice changes nothing.
    """
    exact = sorted({token for token in specials if token.strip()}, key=len, reverse=True)
    return _inert(text, _pattern(tuple(exact)))


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts that `tokenizer` turns into a special id, longest first."""
    return _facts(tokenizer)["specials"]


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """The text that a model has generated, without special tokens; those around a thought stay, as in labels."""
    facts = _facts(tokenizer)
    drop = facts["special_ids"] - {tokenizer.convert_tokens_to_ids(token) for token in THINK if token in facts["specials"]}
    return tokenizer.decode([token for token in ids if token not in drop], skip_special_tokens=False)


def render(tokenizer: Any, messages: list[dict], template_kwargs: dict | None = None) -> list[int]:
    """Token ids of the prompt that asks for the next assistant turn after `messages`.

    Only role and content are read. Contents are made harmless for this tokenizer (most were, before they were stored).
    Raises InputError without a chat template, or where the template refuses the conversation.
    """
    return _apply(tokenizer, messages, template_kwargs, tokenize=True, add_generation_prompt=True)


def end_of_turn(tokenizer: Any, template_kwargs: dict | None = None) -> list[int]:
    """The ids that the template puts after an assistant message, up to and including the first special token.

    Usually one id ("<|im_end|>", "<|eot_id|>"). A template that puts nothing there leaves the tokenizer's eos token.
    """
    known = _facts(tokenizer)["end_of_turn"]
    key = json.dumps(template_kwargs or {}, sort_keys=True)
    if key not in known:
        mark = "Qz7endQz7"
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        text = _apply(tokenizer, said, template_kwargs, tokenize=False, add_generation_prompt=False)
        known[key] = _until_special(tokenizer, encode(tokenizer, text.rpartition(mark)[2]))
    return list(known[key])


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` as it stands in the middle of a conversation: no bos, no space put in front."""
    anchor = _facts(tokenizer)["anchor"]
    ids = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
    return ids[1:] if anchor else ids


def sample(
    tokenizer: Any, messages: list[dict], label: str, template_kwargs: dict | None = None
) -> tuple[list[int], int]:
    """(ids, n_prompt): prompt + label + end of turn; ids[n_prompt:] are the tokens that are trained on."""
    prompt = render(tokenizer, messages, template_kwargs)
    return prompt + _answer(tokenizer, label, template_kwargs), len(prompt)


def samples(
    tokenizer: Any, messages: list[dict], labels: list[tuple[int, str]], template_kwargs: dict | None = None
) -> "Iterator[tuple[np.ndarray, int]]":
    """`sample(messages[:place], label)` for each (place, label) of one conversation, ids as int32, in less time.

    T states tokenised one by one cost T^2 / 2 turns. But a special token always stands alone: between two of them the
    ids depend on the text between them. So each such piece is tokenised once. The longest state is also rendered in
    full; where the ids differ (a tokenizer that looks across special tokens) every state is.
    """
    import numpy as np

    piece: dict[str, np.ndarray] = {}
    split = _facts(tokenizer)["split"].split
    plain = _plain(tokenizer, messages)

    def prompt(place: int) -> np.ndarray:
        text = _template(tokenizer, plain[:place], template_kwargs, tokenize=False, add_generation_prompt=True)
        parts = [part for part in split(text) if part]
        for part in parts:
            if part not in piece:
                piece[part] = np.array(tokenizer(part, add_special_tokens=False)["input_ids"], np.int32)
        return np.concatenate([piece[part] for part in parts])

    def in_full(place: int) -> np.ndarray:
        ids = _template(tokenizer, plain[:place], template_kwargs, tokenize=True, add_generation_prompt=True)
        return np.array(ids, np.int32)

    longest = max(place for place, _ in labels)
    if not np.array_equal(prompt(longest), in_full(longest)):
        prompt = in_full
    for place, label in labels:
        ids = prompt(place)
        yield np.concatenate([ids, np.array(_answer(tokenizer, label, template_kwargs), np.int32)]), len(ids)


def show(tokenizer: Any, ids: list[int], n_prompt: int, file: TextIO | None = None, limit: int = 6000) -> None:
    """Print one sample: the prompt dim, the trained tokens green (between >>> and <<< where colours are off)."""
    file = file or sys.stderr
    colour = file.isatty() and "NO_COLOR" not in os.environ
    dim, green, plain = ("\x1b[2m", "\x1b[1;32m", "\x1b[0m") if colour else ("", ">>>", "<<<")
    prompt = tokenizer.decode(ids[:n_prompt], skip_special_tokens=False)
    label = tokenizer.decode(ids[n_prompt:], skip_special_tokens=False)
    if len(prompt) > limit:
        prompt = f"{prompt[: limit // 2]}\n[... {len(prompt) - limit} characters ...]\n{prompt[-(limit // 2):]}"
    between = plain if colour else ""
    print(f"{dim}{prompt}{between}{green}{label}{plain}", file=file)
    print(f"({n_prompt} prompt tokens, {len(ids) - n_prompt} trained tokens)", file=file, flush=True)


def _answer(tokenizer: Any, label: str, template_kwargs: dict | None) -> list[int]:
    opened = _opened(tokenizer, template_kwargs)
    if opened is not None and label.lstrip().startswith(THINK[0]):
        label = label.lstrip().removeprefix(THINK[0]).removeprefix(opened)
    label = _inert(label, _facts(tokenizer)["pattern"])
    return encode(tokenizer, label) + end_of_turn(tokenizer, template_kwargs)


def _opened(tokenizer: Any, template_kwargs: dict | None) -> str | None:
    """What the generation prompt has after the <think> that it ends with: a label must not open the block again."""
    known = _facts(tokenizer)["opened"]
    key = json.dumps(template_kwargs or {}, sort_keys=True)
    if key not in known:
        asked = [{"role": "user", "content": "a"}]
        text = _apply(tokenizer, asked, template_kwargs, tokenize=False, add_generation_prompt=True)
        _, opens, after = text.rpartition(THINK[0])
        known[key] = after if opens and not after.strip() else None
    return known[key]


def _apply(tokenizer: Any, messages: list[dict], template_kwargs: dict | None, **how: bool) -> Any:
    return _template(tokenizer, _plain(tokenizer, messages), template_kwargs, **how)


def _plain(tokenizer: Any, messages: list[dict]) -> list[dict]:
    """Role and content alone, contents made harmless."""
    pattern = _facts(tokenizer)["pattern"]
    return [{"role": m["role"], "content": _inert(m["content"], pattern)} for m in messages]


def _template(tokenizer: Any, plain: list[dict], template_kwargs: dict | None, **how: bool) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise InputError(
            f"{name}: the tokenizer has no chat template, so its prompts are not defined; take the instruct version "
            "of the model, or put a chat_template.jinja beside its tokenizer"
        )
    from jinja2 import TemplateError

    try:
        given = {"strftime_now": _date} | (template_kwargs or {})
        return tokenizer.apply_chat_template(plain, return_dict=False, **how, **given)
    except TemplateError as error:
        roles = " ".join(m["role"] for m in plain)
        raise InputError(f"the chat template refuses this conversation ({error}); its roles: {roles}") from error


def _date(form: str) -> str:
    _say_date()
    return DATE.strftime(form)


@functools.cache
def _say_date() -> None:
    print(f"the chat template prints today's date: here that is always {DATE}, so that a conversation is the same tokens on "
          "every day (a server prints its own: common/chat.py says what helps)", file=sys.stderr)  # fmt: skip


def _until_special(tokenizer: Any, tail: list[int]) -> list[int]:
    facts = _facts(tokenizer)
    for stops in (facts["special_ids"], facts["added_ids"]):  # some tokenizers do not flag their <|im_end|> as special
        for place, token in enumerate(tail):
            if token in stops:
                return tail[: place + 1]
    if tokenizer.eos_token_id is None:
        raise InputError("the chat template puts no token after an assistant message and the tokenizer has no eos token")
    return [tokenizer.eos_token_id]


def _facts(tokenizer: Any) -> dict:
    """Found out once per tokenizer."""
    if tokenizer not in _cache:
        added = tokenizer.added_tokens_decoder
        special_ids = {id for id, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        specials = {str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        specials = sorted(specials, key=lambda token: (-len(token), token))

        def plain(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        anchor = ""
        for token in sorted(set(tokenizer.all_special_tokens)):
            # Older SentencePiece tokenizers put a space before a text that stands alone, not after a special token.
            alone, after = plain("x"), plain(token + "x")
            if len(plain(token)) == 1 and after[:1] == plain(token) and after[1:] != alone:
                anchor = token
                break
        _cache[tokenizer] = {
            "specials": specials,
            "special_ids": special_ids,
            "added_ids": set(added),
            "split": re.compile(f"({'|'.join(map(re.escape, specials)) or '(?!)'})"),
            "pattern": _pattern(tuple(token for token in specials if token.strip() and token not in THINK)),
            "anchor": anchor,
            "end_of_turn": {},
            "opened": {},
        }
    return _cache[tokenizer]


def _pattern(exact: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join([re.escape(token) for token in exact] + [SPECIAL_LOOK]))  # re keeps a cache


def _inert(text: str, pattern: re.Pattern) -> str:
    for _ in range(8):  # breaking one token can, in contrived text, join the rest into another
        changed = pattern.sub(_break, text)
        if changed == text:
            return text
        text = changed
    while pattern.search(text):
        text = pattern.sub("", text)
    return text


def _break(match: re.Match) -> str:
    token = match.group()
    if len(token) == 1:
        return f"U+{ord(token):04X}"
    if token[:2] in ("<|", "<\uff5c") and token[-2:] in ("|>", "\uff5c>") and len(token) > 4:
        return f"{token[:2]} {token[2:-2]} {token[-2:]}"
    return f"{token[0]} {token[1:]}"
