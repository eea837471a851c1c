"""`hf:`: a transformers model in this process, all threads in one batch (common/hf_engine.py)."""

import hashlib
import re
import threading
from pathlib import Path

from common import models
from common.errors import InputError
from common.policies import Answer, ContextLimit, Plain


class HfPolicy(Plain):
    """MODEL[,adapter=DIR][,quant=nf4|none]; tokenizer and model are loaded with the first question."""

    def __init__(self, rest: str, sampling: dict, max_context: int | None, batch: int, extra: dict):
        super().__init__(sampling)
        self.model, *options = re.split(r",(?=[a-z_]+=)", rest)
        given = dict(option.split("=", 1) for option in options)
        self.adapter = given.pop("adapter", None)
        self.quant = given.pop("quant", None) or models.trained_on(self.adapter)
        if given or not self.model or len({option.split("=")[0] for option in options}) < len(options):
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
            text = chat.text_of(self.tokenizer, said)
        return Answer(text, "stop" if made.stopped else "length", len(ids), made.reused, made.tokens_out,
                      made.seconds, made.logprob)  # fmt: skip

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
