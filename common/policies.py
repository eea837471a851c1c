"""Who answers a state: `hf:`, `vllm:`, `openai:`, `oracle`, `replay:`, each with the same five methods.

    policy.act(row, messages, seed=, episode=, turn=, attempt=) -> Answer     blocks; many threads call it at once
    policy.describe() -> dict       what was asked for, as it is recorded and compared on resume; loads nothing
    policy.count(text) -> int       tokens of a text, None where there is no tokenizer
    policy.forget(episode)          frees what is kept for an episode
    policy.close()

A policy sees messages alone; the row is for the oracle and for `replay:`, which find their answer by its instance_id.
`hf:`, `openai:` and `vllm:` are in hf_policy.py, openai_policy.py and vllm_policy.py. Not here: prices, cached answers.
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from common import jsonl, mixing, run
from common.errors import InputError

KINDS = ("hf:MODEL[,adapter=DIR][,quant=nf4|none]   openai:MODEL@URL   oracle[,noise=P]   replay:FILE   "
         "vllm:MODEL[,adapter=DIR][,gpus=0+1][,util=0.4][,args=...]")  # fmt: skip


class ContextLimit(Exception):
    """The conversation leaves no room for an answer. tokens: (in, cached, out) of one that came all the same."""

    tokens: tuple[int, int, int] | None = None


@dataclass
class Answer:
    """One assistant turn. Token counts are None where the policy has no tokenizer."""

    text: str
    finish_reason: str  # "stop" | "length" (cut off) | "content_filter" (cut off or refused by the server's filter)
    tokens_in: int | None = None
    tokens_cached: int | None = None  # those of tokens_in that were not computed again
    tokens_out: int | None = None
    seconds: float = 0.0
    logprob: float | None = None  # mean per generated token, the one that ends the turn included
    reasoning: str | None = None  # what a server returned apart from the text; recorded, never rendered


@dataclass(kw_only=True)
class PolicyFlags:
    """The policy flags that 01, 02 and 04 share."""

    keep_reasoning: bool = False
    """store the reasoning that a server returns apart inside the content, as generated; labels stored so are trained on so"""
    price: str | None = None
    """dollars per million tokens, IN,CACHED,OUT, of the teacher (in 04: of the scored policy) on a server"""
    max_cost: float | None = None
    """stop before this many dollars are passed, those of earlier calls of the same command included"""

    def options(self, role: str) -> dict:
        """What open_policy wants to know for this role ("student" or "teacher"). Raises InputError for bad JSON."""
        extra = getattr(self, f"{role}_extra", None)
        return {
            "key_env": getattr(self, f"{role}_key_env", None),
            "extra": _json_object(f"--{role}-extra", extra) if extra else None,
            "inflight": getattr(self, f"{role}_inflight", None),
            "keep_reasoning": self.keep_reasoning,
        }


@dataclass(kw_only=True)
class TeacherFlags:
    """The flags of a teacher on a server."""

    teacher_key_env: str = "OPENAI_API_KEY"
    """environment variable with the key of an openai: teacher"""
    teacher_extra: str | None = None
    """JSON object of more fields for the teacher's requests, as {"chat_template_kwargs": {"enable_thinking": false}}"""
    teacher_inflight: int | None = None
    """requests at once to the teacher's server (default: as many as --workers)"""


@dataclass(kw_only=True)
class StudentFlags:
    """The flags of a student on a server."""

    student_extra: str | None = None
    """JSON object of more fields for the requests of the student, or of the teacher where 04 scores it; the student's
    chat_template_kwargs are used in training too"""
    student_inflight: int | None = None
    """requests at once to the student's server (default: as many as --workers)"""


def _json_object(flag: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{flag} {text!r}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f'{flag} {text!r}: must be a JSON object, as {{"top_k": 20}}')
    if not isinstance(value.get("chat_template_kwargs", {}), dict):
        raise InputError(f"{flag} {text!r}: chat_template_kwargs must be a JSON object")
    return value


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
    inflight: int | None = None,
    keep_reasoning: bool = False,
):
    """The policy that `spec` names. Raises InputError for a bad one; models are loaded with the first question.

    role: "student" or "teacher" (the student is asked for log-probabilities; flags are named after it). batch: how many
    threads will ask at once. key_env: the environment variable with the key of a server (default: OPENAI_API_KEY).
    extra: more fields of the request (openai:, vllm:), {"chat_template_kwargs": {...}} (hf:). inflight: requests at once to a
    server (default: batch). keep_reasoning: PolicyFlags.
    """
    kind, _, rest = spec.partition(":")
    sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise InputError(f"--temperature {temperature} --top-p {top_p}: the first is at least 0, the second in (0, 1]")
    if kind == "hf" and rest:
        from common.hf_policy import HfPolicy

        return HfPolicy(rest, sampling, max_context, batch, extra or {})
    server = {"inflight": batch if inflight is None else inflight, "keep_reasoning": keep_reasoning}
    if kind == "openai" and rest:
        from common.openai_policy import OpenAIPolicy

        return OpenAIPolicy(rest, role, sampling, max_context, key_env=key_env, extra=extra or {}, **server)
    if kind == "vllm" and rest:
        from common.vllm_policy import VllmPolicy

        return VllmPolicy(rest, role, sampling, max_context, extra=extra or {}, **server)
    is_oracle = spec.partition(",")[0] == "oracle"
    if extra and (is_oracle or kind == "replay"):
        raise InputError(f"--{role}-extra is for servers and hf:, not for {spec}")
    if is_oracle:
        return OraclePolicy(sampling, spec)
    if kind == "replay" and rest:
        return ReplayPolicy(rest, sampling)
    raise InputError(f"--{role} {spec!r}: no such policy; there are: {KINDS}")


class Plain:
    """What all policies have in common, and all that those without a model need."""

    name = ""
    extra: dict = {}
    answers_states = True  # an answer hangs on the messages, not on whose and which turn it is
    free = True  # asking costs no money
    code = ""  # a hash of the code that makes the answers, where code alone does: a cache's answers are of that code

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


class OraclePolicy(Plain):
    """The scripted expert of the toy tasks; with noise=P it errs at a share P of its turns, drawn from their seeds."""

    def __init__(self, sampling: dict, spec: str = "oracle"):
        super().__init__(sampling)
        _, *options = spec.split(",")
        self.name, self.noise = spec, 0.0
        try:
            for option in options:
                name, _, number = option.partition("=")
                self.noise = {"noise": float(number)}[name]
        except (KeyError, ValueError):
            raise InputError(f"{spec}: wanted oracle[,noise=P]") from None
        self.code = run.hash_file(Path(__file__).with_name("oracle.py"))
        if not 0 <= self.noise <= 1:
            raise InputError(f"{spec}: noise is the share of wrong turns, from 0 to 1")

    def act(self, row: dict, messages: list[dict], *, seed: int, episode: str, turn: int, attempt: int) -> Answer:
        from common import oracle

        started = time.monotonic()
        if mixing.derive("noise", seed) < self.noise * 2**63:
            text = oracle.slip(row, messages, mixing.derive("slip", seed))
        else:
            text = oracle.act(row, messages)
        return Answer(text, "stop", seconds=time.monotonic() - started)


class ReplayPolicy(Plain):
    """Recorded turns: turns[t] answers turn t, whoever acted before.

    Lines of FILE are {"instance_id", "attempt" (optional), "turns": [text, ...]}, or trajectories (their assistant
    messages). A line without an attempt answers every attempt that has no line of its own.
    """

    answers_states = False

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
                told = record["messages"] if isinstance(record["messages"], list) else [None]
                if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in told):
                    raise InputError(f"{where}: {key[0]}: `messages` must be a list of objects with a role and a content")
                said = [m for m in told if m.get("role") == "assistant"]
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
