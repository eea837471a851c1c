"""Who answers a state: `hf:`, `openai:`, `oracle`, `replay:` (DESIGN section 4), each with the same five methods.

    policy.act(row, messages, seed=, episode=, turn=, attempt=) -> Answer     blocks; many threads call it at once
    policy.describe() -> dict       what was asked for, as it is recorded and compared on resume; loads nothing
    policy.count(text) -> int       tokens of a text, None where there is no tokenizer
    policy.forget(episode)          frees what is kept for an episode
    policy.close()

A policy sees messages alone; the row is for the oracle and for `replay:`, which find their answer by its instance_id.
What is not here: starting servers, prices, caching of answers.
"""

import email.utils
import hashlib
import json
import os
import random
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from common import jsonl, models
from common.errors import InfraError, InputError

KINDS = """hf:MODEL[,adapter=DIR][,quant=nf4|none]   openai:MODEL@URL   oracle   replay:FILE"""

# openai: a request is given up after so many tries, or when the next one would begin after so many seconds
TRIES = 5
WINDOW = 60.0
BACKOFF = 2.0  # seconds before the second try; doubled each time, with a quarter of jitter
REQUEST_TIMEOUT = 300.0  # a long answer of a busy server takes minutes


class ContextLimit(Exception):
    """The conversation leaves no room for an answer."""


@dataclass
class Answer:
    """One assistant turn. Token counts are None where the policy has no tokenizer."""

    text: str
    finish_reason: str  # "stop" | "length" (cut off)
    tokens_in: int | None = None
    tokens_cached: int | None = None  # those of tokens_in that were not computed again
    tokens_out: int | None = None
    seconds: float = 0.0
    logprob: float | None = None  # mean per generated token, the one that ends the turn included


def open_policy(
    spec: str,
    *,
    role: str,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    max_context: int | None = None,
    batch: int = 1,
    key_env: str | None = None,
    extra: dict | None = None,
):
    """The policy that `spec` names. Raises InputError for a bad one; models are loaded with the first question.

    role: "student" or "teacher" (who is asked for log-probabilities, whose key key_env names). batch: how many
    threads will ask at once. extra: more fields of the request (openai:), {"chat_template_kwargs": {...}} (hf:).
    """
    kind, _, rest = spec.partition(":")
    sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError(f"--temperature {temperature} --top-p {top_p}: the first is at least 0, the second in (0, 1]")
    if kind == "hf" and rest:
        return HfPolicy(rest, sampling, max_context, batch, extra or {})
    if kind == "openai" and rest:
        return OpenAIPolicy(rest, role, sampling, max_context, key_env, extra or {})
    if spec == "oracle":
        return OraclePolicy(sampling)
    if kind == "replay" and rest:
        return ReplayPolicy(rest, sampling)
    raise InputError(f"--{role} {spec!r}: no such policy; there are: {KINDS}")


class _Plain:
    """What policies without a model have in common."""

    name = ""
    extra: dict = {}

    def __init__(self, sampling: dict):
        self.sampling = sampling

    def describe(self) -> dict:
        return {"model": self.name, "adapter": None, "adapter_hash": None, "quantisation": None,
                "sampling": self.sampling, "extra": self.extra}  # fmt: skip

    def count(self, text: str) -> int | None:
        return None

    def forget(self, episode: str) -> None:
        pass

    def close(self) -> None:
        pass


class OraclePolicy(_Plain):
    """The scripted expert of the toy tasks."""

    name = "oracle"

    def act(self, row: dict, messages: list[dict], *, seed: int, episode: str, turn: int, attempt: int) -> Answer:
        from common import oracle

        started = time.monotonic()
        text = oracle.act(row, messages)
        return Answer(text, "stop", seconds=time.monotonic() - started)


class ReplayPolicy(_Plain):
    """Recorded turns: turns[t] answers turn t, whoever acted before.

    Lines of FILE are {"instance_id", "attempt" (optional), "turns": [text, ...]}, or trajectories (their assistant
    messages). A line without an attempt answers every attempt that has no line of its own.
    """

    def __init__(self, path: str, sampling: dict):
        super().__init__(sampling)
        self.path, self.name = path, f"replay:{path}"
        self.turns: dict[tuple, list[tuple[str, str]]] = {}  # (instance, attempt or None) -> [(text, finish_reason)]
        for number, record in enumerate(jsonl.read(path), 1):
            where = f"{path}:{number}"
            key = (record.get("instance_id"), record.get("attempt"))
            if not isinstance(key[0], str) or not isinstance(key[1], int | None):
                raise InputError(f"{where}: needs an instance_id (a text; an attempt, if there is one, is a number)")
            if "messages" in record:
                said = [m for m in record["messages"] if m["role"] == "assistant"]
                turns = [(m["content"], m.get("finish_reason", "stop")) for m in said]
            else:
                turns = record.get("turns")
                if not isinstance(turns, list) or not all(isinstance(text, str) for text in turns):
                    raise InputError(f"{where}: {key[0]}: needs `turns`, a list of texts, or `messages`")
                turns = [(text, "stop") for text in turns]
            if key in self.turns:
                raise InputError(f"{where}: {key[0]}, attempt {key[1]}, is there twice")
            self.turns[key] = turns
        if not self.turns:
            raise InputError(f"{path}: no recorded turns in there")
        self.extra = {"sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}

    def act(self, row: dict, messages: list[dict], *, seed: int, episode: str, turn: int, attempt: int) -> Answer:
        instance = row["instance_id"]
        turns = self.turns.get((instance, attempt), self.turns.get((instance, None)))
        if turns is None:
            raise InputError(f"{self.path}: nothing recorded for {instance}, attempt {attempt}")
        if turn >= len(turns):
            raise InputError(f"{self.path}: {instance}, attempt {attempt}: asked for turn {turn}, but only "
                             f"{len(turns)} turns are recorded (turns count from 0)")  # fmt: skip
        return Answer(*turns[turn])


class HfPolicy(_Plain):
    """A transformers model in this process, all threads in one batch (common/hf_engine.py)."""

    def __init__(self, rest: str, sampling: dict, max_context: int | None, batch: int, extra: dict):
        super().__init__(sampling)
        self.model, *options = re.split(r",(?=[a-z_]+=)", rest)
        given = dict(option.split("=", 1) for option in options)
        self.adapter = given.pop("adapter", None)
        self.quant = given.pop("quant", None) or models.trained_on(self.adapter)
        if given or not self.model:
            raise InputError(f"hf:{rest}: wanted hf:MODEL[,adapter=DIR][,quant=nf4|none]")
        if self.quant not in ("nf4", "none"):
            raise InputError(f"hf:{rest}: quant={self.quant} is neither nf4 nor none")
        self.name, self.extra = f"hf:{self.model}", extra
        self.template_kwargs = dict(extra.get("chat_template_kwargs") or {})
        if set(extra) - {"chat_template_kwargs"}:
            raise InputError(f"hf: takes no extra fields but chat_template_kwargs, not {', '.join(sorted(extra))}")
        self.adapter_hash = None
        if self.adapter:
            models.check_adapter(self.adapter, self.model)
            self.adapter_hash = hash_adapter(self.adapter)
        if self.model.startswith((".", "/", "~")) and not Path(self.model).is_dir():
            raise InputError(f"hf:{self.model}: no such directory")
        self.max_context, self.batch = max_context, batch
        self.lock = threading.Lock()  # tokenizers are not safe to share between threads
        self.tokenizer = self.engine = None

    def describe(self) -> dict:
        return super().describe() | {
            "adapter": self.adapter, "adapter_hash": self.adapter_hash, "quantisation": self.quant}  # fmt: skip

    def _open(self) -> None:
        """Tokenizer and engine, with the first question. Called with the lock held."""
        from common import chat, hf_engine

        if self.tokenizer is None:
            self.tokenizer, longest = models.load_tokenizer(self.model)
            self.max_context = min(x for x in (self.max_context, longest, 2**31) if x)
            self.turn_end = chat.end_of_turn(self.tokenizer, self.template_kwargs)
            self.engine = hf_engine.Engine(
                self.model, self.adapter, self.quant, stop={self.turn_end[-1]}, rows=self.batch,
                temperature=self.sampling["temperature"], top_p=self.sampling["top_p"])  # fmt: skip

    def act(self, row: dict, messages: list[dict], *, seed: int, episode: str, turn: int, attempt: int) -> Answer:
        from common import chat

        started = time.monotonic()
        with self.lock:
            self._open()
            ids = chat.render(self.tokenizer, messages, self.template_kwargs)
        if len(ids) > self.max_context - 1:
            raise ContextLimit(f"{len(ids)} tokens, and --max-context is {self.max_context}")
        limit = min(self.sampling["max_new_tokens"], self.max_context - len(ids))
        made = self.engine.generate(ids, limit=limit, seed=seed, episode=episode)
        said, before_end = made.ids, self.turn_end[:-1]
        if made.stopped and before_end and said[-len(before_end) :] == before_end:
            said = said[: -len(before_end)]  # a template that ends a turn with "\n<|end|>": the newline is its own
        with self.lock:
            text = self.tokenizer.decode(said, skip_special_tokens=True)
        return Answer(text, "stop" if made.stopped else "length", len(ids), made.reused, made.tokens_out,
                      time.monotonic() - started, made.logprob)  # fmt: skip

    def count(self, text: str) -> int:
        with self.lock:
            self._open()
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def forget(self, episode: str) -> None:
        if self.engine:
            self.engine.forget(episode)

    def close(self) -> None:
        if self.engine:
            self.engine.close()


def hash_adapter(directory: str) -> str:
    """One hash of the weights and the configuration of a PEFT adapter."""
    digest = hashlib.sha256()
    for path in sorted(Path(directory).glob("adapter_*")):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# ---------------------------------------------------------------- openai:

class OpenAIPolicy(_Plain):
    """Any OpenAI-compatible server, through the official SDK (whose own retries are off: ours are bounded)."""

    def __init__(self, rest: str, role: str, sampling: dict, max_context: int | None, key_env: str | None, extra: dict):
        super().__init__(sampling)
        self.model, at, url = rest.partition("@http")
        self.url = "http" + url
        parts = urlsplit(self.url)
        if not (self.model and at and parts.scheme in ("http", "https") and parts.hostname):
            raise InputError(f"openai:{rest}: wanted openai:MODEL@URL, as openai:qwen3-8b@http://localhost:8000/v1")
        if not parts.path.strip("/"):
            self.url = self.url.rstrip("/") + "/v1"
        self.name, self.extra, self.max_context = f"openai:{self.model}", extra, max_context
        self.local = parts.hostname == "localhost" or parts.hostname == "::1" or parts.hostname.startswith("127.")
        self.key = api_key(key_env if role == "teacher" else None, self.local, parts.hostname)
        self.ask_logprobs = role == "student"
        self.limit_name = "max_tokens"
        self.lock = threading.Lock()
        self.client = None

    def _open(self):
        import openai

        with self.lock:
            if self.client is None:
                # A proxy that the environment names cannot reach this machine's own addresses.
                http = openai.DefaultHttpxClient(trust_env=False) if self.local else None
                self.client = openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=0,
                                            timeout=REQUEST_TIMEOUT, http_client=http)  # fmt: skip
            return self.client

    def act(self, row: dict, messages: list[dict], *, seed: int, episode: str, turn: int, attempt: int) -> Answer:
        started, jitter = time.monotonic(), random.Random(seed)
        for number in range(1, TRIES + 1):
            try:
                return self._ask(messages, seed, started)
            except _Again as again:
                wait = again.after
                if wait is None:
                    wait = BACKOFF * 2 ** (number - 1) * jitter.uniform(0.75, 1.25)
                if number == TRIES or time.monotonic() - started + wait > WINDOW:
                    raise InfraError(f"{self.name} at {self.url}: given up after {number} tries in "
                                     f"{time.monotonic() - started:.0f} s: {again}") from None  # fmt: skip
                time.sleep(wait)

    def _ask(self, messages: list[dict], seed: int, started: float) -> Answer:
        """One try. _Again: worth another one. ContextLimit; InputError: this can never work."""
        import openai

        sent = [{"role": m["role"], "content": m["content"]} for m in messages]
        options = {self.limit_name: self.sampling["max_new_tokens"]} | ({"logprobs": True} if self.ask_logprobs else {})
        try:
            reply = self._open().chat.completions.create(
                model=self.model, messages=sent, temperature=self.sampling["temperature"], seed=seed % 2**31,
                top_p=self.sampling["top_p"], extra_body=self.extra or None, **options)  # fmt: skip
        except openai.APIStatusError as error:
            words = _words(error)
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                if "insufficient_quota" not in words:
                    raise _Again(f"HTTP {error.status_code}: {words}", _retry_after(error.response.headers)) from None
            elif error.status_code in (400, 413, 422):
                if CONTEXT_WORDS.search(words):
                    raise ContextLimit(words) from None
                if "logprobs" in words and self.ask_logprobs:
                    self.ask_logprobs = False  # a server that has none: the record says null
                    return self._ask(messages, seed, started)
                if "max_completion_tokens" in words and self.limit_name == "max_tokens":
                    self.limit_name = "max_completion_tokens"  # what newer models of OpenAI want it called
                    return self._ask(messages, seed, started)
            raise InputError(f"{self.name} at {self.url}: HTTP {error.status_code}: {words}") from None
        except openai.APIConnectionError as error:  # timeouts too
            raise _Again(f"{error} {error.__cause__ or ''}".strip()) from None
        except (openai.APIResponseValidationError, ValueError) as error:  # JSON that breaks off
            raise _Again(f"not an answer: {str(error)[:200]}") from None

        choices = getattr(reply, "choices", None)
        if not choices or choices[0].message is None:
            raise _Again("an answer without choices")
        choice, usage = choices[0], getattr(reply, "usage", None)
        tokens_in = usage.prompt_tokens if usage else None
        if self.max_context and tokens_in and tokens_in > self.max_context - 1:
            raise ContextLimit(f"{tokens_in} tokens, and --max-context is {self.max_context}")
        details = getattr(usage, "prompt_tokens_details", None)
        logprobs = [token.logprob for token in (getattr(choice.logprobs, "content", None) or [])]
        return Answer(
            text=choice.message.content or "",
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            tokens_in=tokens_in,
            tokens_cached=getattr(details, "cached_tokens", None),
            tokens_out=usage.completion_tokens if usage else None,
            seconds=time.monotonic() - started,
            logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        )

    def close(self) -> None:
        if self.client:
            self.client.close()


# How servers say that a conversation is too long: OpenAI, vLLM, SGLang, llama.cpp, TGI.
CONTEXT_WORDS = re.compile(
    r"context_length_exceeded|exceed_context_size|(maximum )?context length|context (size|window)|maximum model length"
    r"|longer than the (model's|maximum)|prompt is too long|max_new_tokens` must be <=",
    re.IGNORECASE,
)


class _Again(Exception):
    """This try failed in a way that another may not. `after`: seconds that the server asked to wait."""

    def __init__(self, words: str, after: float | None = None):
        super().__init__(words)
        self.after = after


def api_key(key_env: str | None, local: bool, host: str) -> str:
    """The key in the variable `key_env`, by default OPENAI_API_KEY; a server on this machine needs none."""
    key = os.environ.get(key_env or "OPENAI_API_KEY")
    if key:
        return key
    if local and not key_env:
        return "none"
    raise InputError(f"no key for {host}: set the environment variable {key_env or 'OPENAI_API_KEY'}, "
                     "or name another one with --teacher-key-env")  # fmt: skip


def _words(error) -> str:
    """What the server said, in one line."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("error", body)
    text = " ".join(str(body.get(k)) for k in ("message", "code") if body.get(k)) if isinstance(body, dict) else body
    text = text or json.dumps(error.body) if error.body else error.message
    return " ".join(str(text).split())[:400]


def _retry_after(headers) -> float | None:
    """Seconds that a Retry-After header asks for: a number or an HTTP date."""
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
