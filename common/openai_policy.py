"""`openai:MODEL@URL`: any OpenAI-compatible server.

Many threads ask at once; their requests run on one event loop in a thread of its own, through the async SDK. The SDK's
own retries are off: ours are bounded, and a place in flight is kept while they wait. What a server may do wrong, and
what becomes of it:

    conversation too long                           ContextLimit: the trajectory ends as context_limit
    429, 5xx, connection cut, no or half an answer  tried again, then InfraError: the task is tried again later
    wrong key, unknown model, refused field         InputError: the script stops, in the server's own words
    stopped by a content filter                     an answer with finish_reason content_filter: no good action

Not here: streaming, starting servers, models without sampling parameters. Text that looks like a special token is sent as
it is stored, without the look of <|...|>; of other looks ("</s>") the server's tokenizer decides, which is not known here.
"""

import asyncio
import difflib
import email.utils
import hashlib
import json
import math
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
REQUEST_TIMEOUT = 600.0  # seconds of one try, all in all; a long answer of a busy server takes minutes
CONNECT_TIMEOUT = 20.0
# An HTTP client looks at each of its connections for every request. A conversation of 100 KB, 512 in flight: 7.5 ms of
# CPU a request with all connections in one client, 4 ms in clients of 32.
CONNECTIONS = 32

# The scripts set these fields, or rely on their being as they are: the flag that sets each, or why it is refused.
OURS = {
    "model": "the policy names the model",
    "temperature": "use --temperature",
    "top_p": "use --top-p",
    "max_tokens": "use --max-new-tokens",
    "max_completion_tokens": "use --max-new-tokens",
    "seed": "use --seed",
    "logprobs": "the student is asked for them anyway",
    **dict.fromkeys(("n", "stream", "stream_options"), "one whole answer is wanted"),
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call"), "a command comes as text"),
    **dict.fromkeys(("messages", "prompt", "echo", "chat_template", "documents", "add_generation_prompt",
                     "continue_final_message", "truncate_prompt_tokens"),
                    "what is sent is what is stored and trained on"),
}  # fmt: skip


class OpenAIPolicy(Plain):
    """MODEL@URL; the SDK is imported and connections are made with the first question."""

    free = False

    def __init__(self, rest: str, role: str, sampling: dict, max_context: int | None, *, key_env: str | None,
                 extra: dict, inflight: int, keep_reasoning: bool):  # fmt: skip
        super().__init__(sampling)
        self.model, at, url = rest.partition("@http")
        self.url = "http" + url
        parts = urlsplit(self.url)
        if not (self.model and at and parts.scheme in ("http", "https") and parts.hostname):
            raise InputError(f"openai:{rest}: wanted openai:MODEL@URL, as openai:qwen3-8b@http://localhost:8000/v1")
        if not parts.path.strip("/"):
            self.url = self.url.rstrip("/") + "/v1"
        check_options(role, extra, inflight)
        self.name, self.extra, self.max_context = f"openai:{self.model}", extra, max_context
        self.local = parts.hostname == "localhost" or parts.hostname == "::1" or parts.hostname.startswith("127.")
        self.key_env = key_env or "OPENAI_API_KEY"
        self.key = api_key(self.key_env, parts.scheme == "http" or self.local, parts.hostname)
        self.inflight, self.keep_reasoning = inflight, keep_reasoning
        self.ask_logprobs = role == "student"
        self.limit_name = "max_tokens"
        self.clients: list = []
        self.places: asyncio.LifoQueue | None = None  # a client for each request in flight; the warmest one first

    def describe(self) -> dict:
        return super().describe() | ({"keep_reasoning": True} if self.keep_reasoning else {})

    def act(self, row: dict, messages: list[dict], *, seed: int, episode: str, turn: int, attempt: int) -> Answer:
        return asyncio.run_coroutine_threadsafe(self._act(messages, seed, episode), event_loop()).result()

    def close(self) -> None:
        async def close():
            clients, self.clients, self.places = self.clients, [], None
            for client in clients:
                await client.close()

        asyncio.run_coroutine_threadsafe(close(), event_loop()).result()

    def _open(self) -> None:
        """Called on the event loop, where nothing comes between."""
        import openai

        try:
            import httpx2 as httpx  # what version 3 of the SDK stands on
        except ImportError:
            import httpx

        self.places = asyncio.LifoQueue()
        for start in range(0, self.inflight, CONNECTIONS):
            size = min(CONNECTIONS, self.inflight - start)
            limits = httpx.Limits(max_connections=size, max_keepalive_connections=size, keepalive_expiry=300)
            # A proxy that the environment names cannot reach this machine's own addresses.
            http = openai.DefaultAsyncHttpxClient(trust_env=not self.local, limits=limits)
            client = openai.AsyncOpenAI(base_url=self.url, api_key=self.key, max_retries=0, http_client=http,
                                        timeout=openai.Timeout(None, connect=CONNECT_TIMEOUT))  # fmt: skip
            self.clients.append(client)
            for _ in range(size):
                self.places.put_nowait(client)

    async def _act(self, messages: list[dict], seed: int, episode: str) -> Answer:
        """Wait for a place in flight, then ask until there is an answer; the time of an answer is that of the try that gave it."""
        if self.places is None:
            self._open()
        places = self.places
        client = await places.get()
        try:
            started, jitter = time.monotonic(), random.Random(seed)
            for number in range(1, TRIES + 1):
                begun = time.monotonic()
                try:
                    answer = await self._ask(client, messages, seed, episode)
                    answer.seconds = time.monotonic() - begun
                    return answer
                except _Again as again:
                    wait = max(again.after or 0.0, BACKOFF * 2 ** (number - 1) * jitter.uniform(0.75, 1.25))
                    if number == TRIES or time.monotonic() - started + wait > WINDOW:
                        raise InfraError(f"{self.name} at {self.url}: given up after {number} tries in "
                                         f"{time.monotonic() - started:.0f} s: {again}") from None  # fmt: skip
                    await asyncio.sleep(wait)
        finally:
            places.put_nowait(client)

    async def _ask(self, client, messages: list[dict], seed: int, episode: str) -> Answer:
        """One try. _Again: worth another one. ContextLimit; InputError: this can never work."""
        import openai

        body = {
            "model": self.model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
            "temperature": self.sampling["temperature"],
            "top_p": self.sampling["top_p"],
            self.limit_name: self.sampling["max_new_tokens"],
            "seed": seed % 2**31,
            **({"logprobs": True} if self.ask_logprobs else {}),
            **self.extra,
        }
        # A router in front of several servers can send an episode to the one that has its prefix cached.
        session = hashlib.sha256(episode.encode()).hexdigest()[:32]
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                # Not chat.completions.create: what it makes of messages and log-probabilities costs 20 ms of CPU more.
                reply = await client.post("/chat/completions", cast_to=object, body=body,
                                          options={"headers": {"x-session-id": session}})  # fmt: skip
            if isinstance(reply, str):  # a server that does not say that it is JSON
                reply = json.loads(reply)
        except TimeoutError:
            raise _Again(f"no whole answer within {REQUEST_TIMEOUT:g} s") from None
        except openai.APIStatusError as error:
            words = _words(error.body) or error.message
            if error.status_code == 413 or error.status_code != 429 and CONTEXT_WORDS.search(words):
                raise ContextLimit(words) from None
            if error.status_code in (408, 409, 425, 429) or error.status_code >= 500:
                if "insufficient_quota" not in words:
                    raise _Again(f"HTTP {error.status_code}: {words}", _retry_after(error.response.headers)) from None
            elif FILTER_WORDS.search(words):
                return Answer("", "content_filter")
            elif error.status_code in (400, 422):
                if "logprobs" in words and "logprobs" in body:  # as it was sent: others may have found it out meanwhile
                    self.ask_logprobs = False  # a server that has none: the record says null
                    return await self._ask(client, messages, seed, episode)
                if "max_completion_tokens" in words and "max_tokens" in body:
                    self.limit_name = "max_completion_tokens"  # what newer models of OpenAI want it called
                    return await self._ask(client, messages, seed, episode)
            hint = await self._hint(client, error.status_code)
            raise InputError(f"{self.name} at {self.url}: HTTP {error.status_code}: {words}{hint}") from None
        except openai.APIConnectionError as error:
            raise _Again(f"{error} {error.__cause__ or ''}".strip()) from None
        except ValueError as error:  # JSON that breaks off
            raise _Again(f"not an answer: {str(error)[:200]}") from None
        return self._read(reply)

    def _read(self, reply: object) -> Answer:
        """The answer in what a server sent with status 200."""
        if isinstance(reply, dict) and reply.get("error"):  # gateways
            words = _words(reply)
            raise ContextLimit(words) if CONTEXT_WORDS.search(words) else _Again(words)
        try:
            choice = reply["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            content, usage = message.get("content") or "", reply.get("usage") or {}
            logprobs = [token["logprob"] for token in (choice.get("logprobs") or {}).get("content") or []]
            if not all(isinstance(number, int | float) and math.isfinite(number) for number in logprobs):
                logprobs = []  # of an answer with a token that has none, nothing is known
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        except (TypeError, KeyError, IndexError, AttributeError):
            raise _Again(f"not an answer: {str(reply)[:200]}") from None
        if not isinstance(content, str):
            raise InputError(f"{self.name} at {self.url}: the content of an answer is no text: {str(content)[:200]}")
        if finish in ("abort", "error", "insufficient_system_resource"):  # the server broke off
            raise _Again(f"finish_reason {finish}")
        tokens_in = usage.get("prompt_tokens")
        longest = (tokens_in or 0) + max(usage.get("completion_tokens") or 0, 1)  # 03_train.py would leave out more than that
        if self.max_context and tokens_in and longest > self.max_context:
            limit = ContextLimit(f"{longest} tokens with the answer, and --max-context is {self.max_context}")
            limit.tokens = (tokens_in, cached or 0, usage.get("completion_tokens") or 0)
            raise limit
        reasoning = message.get("reasoning_content") or message.get("reasoning") or None
        if reasoning and self.keep_reasoning:
            content, reasoning = rejoin(reasoning, content, finish), None
        return Answer(
            text=content.encode(errors="replace").decode(),  # half an emoji is valid JSON and no valid text
            finish_reason="length" if finish in CUT_OFF else finish if finish == "content_filter" else "stop",
            tokens_in=tokens_in,
            tokens_cached=cached,
            tokens_out=usage.get("completion_tokens"),
            logprob=sum(logprobs) / len(logprobs) if logprobs else None,
            reasoning=reasoning,
        )

    async def _hint(self, client, status: int) -> str:
        """What helps beyond the server's own words: the variable of the key, the models that there are."""
        if status in (401, 403):
            return f" (the key is taken from the environment variable {self.key_env})"
        if status != 404:
            return ""
        import openai

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                there = [model["id"] for model in (await client.get("/models", cast_to=object))["data"]]
        except (openai.OpenAIError, TimeoutError, ValueError, TypeError, KeyError):
            return " (and it lists no models: is the address right? Most end in /v1)"
        near = difflib.get_close_matches(self.model, there, n=10, cutoff=0)
        return f" (its models: {', '.join(near)}{f' and {len(there) - 10} more' if len(there) > 10 else ''})"


def check_options(role: str, extra: dict, inflight: int) -> None:
    """Raise InputError for what --ROLE-extra and --ROLE-inflight may not be."""
    for name in sorted(extra.keys() & OURS.keys()):
        raise InputError(f"--{role}-extra: the field {name!r} cannot be set there: {OURS[name]}")
    if inflight < 1:
        raise InputError(f"--{role}-inflight must be at least 1, not {inflight}")


def rejoin(reasoning: str, content: str, finish: str | None) -> str:
    """The text of a turn whose reasoning the server returned apart.

    Exact where the model writes <think> itself and the server cuts at the tags and nowhere else: vLLM's and SGLang's
    parsers for Qwen3 and DeepSeek. Servers that also strip white space (DeepSeek's own, older SGLang) leave none around
    the tags. Where the chat template already opens the block (Qwen3-Thinking, DeepSeek-R1) the first <think> is one
    that the model did not write; and a model with other marks than these gets these.
    """
    cut_while_thinking = finish == "length" and not content
    return f"<think>{reasoning}" if cut_while_thinking else f"<think>{reasoning}</think>{content}"


# How servers say that a conversation is too long: OpenAI, Azure, vLLM, SGLang, llama.cpp, TGI, and gateways to others.
CONTEXT_WORDS = re.compile(
    r"context[_ ](length|size|window|limit)|maximum (model|prompt|input|allowed|sequence) length"
    r"|(prompt|input|request) is too (long|large)|token count[^.]* exceeds|exceed\w* (the )?(model )?token limit"
    r"|max_new_tokens` must be <=|must have less than \d+ tokens|reduce the length of|range of input length"
    r"|prompt_tokens \(\d+\) must be less",
    re.IGNORECASE,
)
CUT_OFF = ("length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "model_length")  # of gateways, too
FILTER_WORDS = re.compile(r"content_filter|content management policy|was flagged", re.IGNORECASE)

_starting = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def event_loop() -> asyncio.AbstractEventLoop:
    """The one loop of this process, in a daemon thread: it ends with the process, whatever it waits for."""
    global _loop
    with _starting:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="openai", daemon=True).start()
        return _loop


class _Again(Exception):
    """This try failed in a way that another may not. `after`: seconds that the server asked to wait."""

    def __init__(self, words: str, after: float | None = None):
        super().__init__(words)
        self.after = after


def api_key(key_env: str, none_needed: bool, host: str) -> str:
    """The key in the variable `key_env`; servers on this machine and those without https may want none."""
    key = os.environ.get(key_env)
    if key:
        return key
    if none_needed and key_env == "OPENAI_API_KEY":
        return "none"
    raise InputError(f"no key for {host}: set the environment variable {key_env}, "
                     "or name another one with --teacher-key-env")  # fmt: skip


def _words(body: object) -> str:
    """What the server said, in one line: servers put it into {"error": {"message"}}, {"error"} or {"message"}."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        said = [str(error[name]) for name in ("message", "type", "code") if error.get(name)]
        metadata = error.get("metadata")
        raw = metadata.get("raw") if isinstance(metadata, dict) else metadata  # OpenRouter: the words of the server behind it
        error = " ".join(said + [str(raw)] * bool(raw)) or json.dumps(error)
    return " ".join(str(error or "").split())[:600]


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
