"""`openai:`: any OpenAI-compatible server."""

import email.utils
import json
import os
import random
import re
import threading
import time
from urllib.parse import urlsplit

from common.errors import InfraError, InputError
from common.policies import Answer, ContextLimit, Plain

# A request is given up after so many tries, or when the next one would begin after so many seconds
TRIES = 5
WINDOW = 60.0
BACKOFF = 2.0  # seconds before the second try; doubled each time, with a quarter of jitter
REQUEST_TIMEOUT = 300.0  # a long answer of a busy server takes minutes


class OpenAIPolicy(Plain):
    """Any OpenAI-compatible server, through the official SDK (whose own retries are off: ours are bounded)."""

    free = False

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
    if local and key_env in (None, "OPENAI_API_KEY"):
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
