"""In-process generation for the `hf:` policies: transformers, one model thread, many episodes in one batch.

Every episode owns a row of a store of keys and values and keeps it between its turns. A step of the model thread takes
the next tokens of all the rows that want some, whether one (decoding) or many (a prompt, or what a turn added to it),
and runs them as ONE packed sequence: the linear layers see no padding, and an attention function of our own lets every
token see its own row alone (common/hf_attention.py). So requests join and leave between any two steps, and nothing is
copied back and forth.

What is reused is the longest common prefix of the tokens, so templates that rewrite old turns and text that
tokenises differently the second time cost speed, never correctness.

What it does not do: several devices, recurrent layers, attention with sinks or soft caps (refused with a message).
`vllm:` and `openai:` are for big models; this is for the embedded student, for tests, and for small models on one GPU.
"""

import math
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import models
from common.errors import InfraError, InputError
from common.hf_attention import Step, Store, attend
from common.linears import pack_linears

GATHER_SECONDS = 0.02  # how long an idle engine waits for company after the first request
PREFILL_TOKENS = {"cpu": 256, "cuda": 4096}  # prompt tokens in one step; bounds the memory of a step
COLUMNS = 128  # rows of the store grow by so many tokens


@dataclass
class Generated:
    ids: list[int]  # without the token that stopped it
    stopped: bool  # False: the limit of new tokens was reached
    reused: int  # prompt tokens whose keys and values were at hand
    logprob: float | None  # mean over generated tokens, the stopping one included, at temperature 1
    tokens_out: int  # generated tokens, the stopping one included
    seconds: float  # since it had its place in the batch


@dataclass
class _Request:
    ids: list[int]  # prompt, then what was generated
    prompt: int
    limit: int  # new tokens at most
    episode: str
    generator: Any
    future: Future = field(default_factory=Future)
    reused: int = 0
    admitted: float = 0.0  # on the monotonic clock
    logprobs: list[float] = field(default_factory=list)


@dataclass
class _Row:
    """One row of the store: whose it is, and the tokens whose keys and values stand in its first columns."""

    episode: str | None = None
    tokens: list[int] = field(default_factory=list)
    request: _Request | None = None
    used: int = 0  # the step that used it last


def load_model(model: str, adapter: str | None = None, quant: str = "none"):
    """The causal language model, ready for inference: fp32 on CPU, bf16 on CUDA; `quant="nf4"` rounds the weights.

    fp32 weights take the adapter in (merged). On a CPU NF4 weights are expanded again at once: the same numbers as NF4
    training sees, at the speed of fp32. On CUDA NF4 and bf16 weights keep the adapter beside them, as in training.
    """
    cpu = models.device_name() == "cpu"
    loaded = models.load_base(model, quant)
    if quant == "nf4" and cpu:
        loaded = loaded.dequantize()
    if adapter:
        wrapped = models.load_adapter(loaded, model, adapter)
        loaded = wrapped.merge_and_unload() if cpu else wrapped.get_base_model()
    return loaded.eval().requires_grad_(False)


# ---------------------------------------------------------------- the engine

class Engine:
    """generate() from any thread; the model runs in one thread of its own and is loaded with the first request."""

    def __init__(self, model: str, adapter: str | None, quant: str, *, stop: set[int], temperature: float,
                 top_p: float, rows: int):
        self.spec, self.stop, self.temperature, self.top_p = (model, adapter, quant), set(stop), temperature, top_p
        self.most_rows = max(1, rows)
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()
        self.broken: BaseException | None = None
        self.rows: list[_Row] = []
        self.waiting: list[_Request] = []
        self.steps = 0
        self.spent = {"prefill_tokens": 0, "decode_tokens": 0, "steps": 0, "seconds": 0.0}

    def generate(self, ids: list[int], *, limit: int, seed: int, episode: str) -> Generated:
        """Answers the prompt `ids` with at most `limit` new tokens; blocks. InputError (model), InfraError (memory)."""
        import torch

        request = _Request(list(ids), len(ids), limit, episode, torch.Generator().manual_seed(seed % 2**63))
        with self.lock:
            if self.broken:
                raise self.broken
            if self.thread is None:
                self.thread = threading.Thread(target=self._serve, name="hf-engine", daemon=True)
                self.thread.start()
            self.inbox.put(request)
        return request.future.result()

    def forget(self, episode: str) -> None:
        """The keys and values of `episode` may go."""
        self.inbox.put(("forget", episode))

    def close(self) -> None:
        """Ends the model thread; whoever still waits gets an InfraError."""
        with self.lock:
            self.broken = self.broken or InfraError("the model was closed")
            thread, self.thread = self.thread, None
        if thread:
            self.inbox.put(("close", None))
            thread.join()

    def _serve(self) -> None:
        import torch

        try:
            self._load()
            with torch.inference_mode():
                while self._receive():
                    self._admit()
                    started = time.monotonic()
                    self._step()
                    self.spent["seconds"] += time.monotonic() - started
            raise InfraError("the model was closed")
        except BaseException as error:  # noqa: BLE001  whoever waits must hear of it, whatever it is
            once = type(error).__name__ == "OutOfMemoryError"  # then the next question loads the model anew
            if once:
                error = InfraError(f"{self.spec[0]}: out of GPU memory; use fewer --workers or a smaller --max-context")
            with self.lock:  # nobody asks meanwhile
                left = self.waiting + [row.request for row in self.rows if row.request]
                while not self.inbox.empty():
                    left.append(self.inbox.get())
                self.rows, self.waiting = [], []
                self.model = self.store = None
                self.thread, self.broken = (None, self.broken) if once else (self.thread, error)
            for request in left:
                if isinstance(request, _Request):
                    request.future.set_exception(error)

    def _load(self) -> None:
        import torch
        from transformers import AttentionInterface

        AttentionInterface.register("swe_dagger_rows", attend)
        model = load_model(*self.spec)
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not kinds <= {"full_attention", "sliding_attention"} or not model._supports_attention_backend:
            raise InputError(f"{self.spec[0]}: hf: runs models with plain attention layers, this one has "
                             f"{', '.join(sorted(kinds))}; use openai: with a server")
        model.set_attn_implementation("swe_dagger_rows")
        self.model, self.device = model, next(model.parameters()).device
        if self.device.type == "cpu":
            with torch.inference_mode():
                pack_linears(model)
        eos = model.generation_config.eos_token_id
        self.stop |= set(eos if isinstance(eos, list) else [eos]) - {None}
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = torch.finfo(model.dtype).bits // 8
        self.token_bytes = 2 * config.num_hidden_layers * kv_heads * head * size
        if self.device.type == "cuda":
            self.budget = 0.8 * torch.cuda.mem_get_info()[0]
        else:
            self.budget = 0.5 * _available_memory()
        self.store = Store(config.num_hidden_layers)
        self.prefill = PREFILL_TOKENS[self.device.type]

    # ------------------------------------------------ requests and rows

    def _receive(self) -> bool:
        """Takes what has come in; waits if there is nothing else to do. False: time to go."""
        idle = not self.waiting and not any(row.request for row in self.rows)
        until = None
        while True:
            try:
                if idle and until is None:
                    item = self.inbox.get()
                elif idle:
                    item = self.inbox.get(timeout=max(0.0, until - time.monotonic()))
                else:
                    item = self.inbox.get_nowait()
            except queue.Empty:
                return True
            if isinstance(item, _Request):
                self.waiting.append(item)
                until = until or time.monotonic() + GATHER_SECONDS
                if len(self.waiting) >= self.most_rows:
                    idle = False
            elif item[0] == "close":
                return False
            else:
                for row in self.rows:
                    if row.episode == item[1] and row.request is None:
                        row.episode, row.tokens = None, []

    def _admit(self) -> None:
        """Gives waiting requests their rows: the episode's own, a free one, or the one idle for longest."""
        for request in list(self.waiting):
            try:
                if not self._reserve(request):
                    break
            except InfraError as error:  # of this one alone
                self.waiting.remove(request)
                request.future.set_exception(error)
                continue
            row = next((r for r in self.rows if r.episode == request.episode), None)
            if row is None:
                idle = [r for r in self.rows if r.request is None]
                row = min(idle, key=lambda r: (r.episode is not None, r.used), default=None)
            if row is None or row.request is not None:  # all busy, or the same episode asks twice at once
                continue
            self.waiting.remove(request)
            shared = _common_prefix(row.tokens, request.ids) if row.episode == request.episode else 0
            request.reused = min(shared, request.prompt - 1)  # the last token is needed for its logits
            row.tokens = request.ids[: request.reused]
            row.episode, row.request, request.admitted = request.episode, request, time.monotonic()

    def _reserve(self, request: _Request) -> bool:
        """Makes the store wide enough for `request`, with fewer rows if memory says so. False: it has to wait."""
        columns = max(self.store.columns, math.ceil((request.prompt + request.limit) / COLUMNS) * COLUMNS)
        rows = min(self.most_rows, int(self.budget // (columns * self.token_bytes)))
        busy = [row for row in self.rows if row.request]
        if rows < max(1, len(busy)):
            if not busy:
                raise InfraError(f"{self.spec[0]}: no memory for a conversation of {columns} tokens "
                                 f"({columns * self.token_bytes / 2**30:.1f} GiB); use a smaller --max-context")
            return False
        if (rows, columns) != (self.store.rows, self.store.columns):
            if rows < len(self.rows):
                self._to_front(busy)
            self.store.resize(rows, columns, self._used())
            self.rows = (self.rows + [_Row() for _ in range(rows)])[:rows]
        return True

    def _used(self) -> int:
        return max((len(row.tokens) for row in self.rows), default=0)

    def _to_front(self, wanted: list[_Row]) -> None:
        """Reorders rows so that `wanted` are the first ones."""
        holes = [i for i in range(len(wanted)) if not any(self.rows[i] is row for row in wanted)]
        for here in range(len(wanted), len(self.rows)):
            if any(self.rows[here] is row for row in wanted):
                there = holes.pop()
                self.store.swap(here, there, max(len(self.rows[here].tokens), len(self.rows[there].tokens)))
                self.rows[here], self.rows[there] = self.rows[there], self.rows[here]

    # ------------------------------------------------ one step of the model

    def _step(self) -> None:
        """Runs the next tokens of all busy rows and samples where a row's tokens are all in."""
        import torch

        busy = [row for row in self.rows if row.request]
        if not busy:
            return
        singles = [row for row in busy if len(row.request.ids) - len(row.tokens) == 1]
        places = [i for i, row in enumerate(self.rows) if any(row is s for s in singles)]
        if singles and places[-1] + 1 - places[0] > 1.5 * len(singles):  # too many rows looked at for nothing
            self._to_front(singles)
        work, left = [], self.prefill  # (row index, its next tokens); singles first
        for i, row in enumerate(self.rows):
            if row.request and len(row.request.ids) - len(row.tokens) == 1:
                work.append((i, row.request.ids[-1:]))
        n_singles = len(work)
        for i, row in enumerate(self.rows):
            if row.request and len(row.request.ids) - len(row.tokens) > 1 and left > 0:
                new = row.request.ids[len(row.tokens) : len(row.tokens) + left]
                work.append((i, new))
                left -= len(new)

        ids, rows, columns, segments, last = [], [], [], [], []
        for n, (i, new) in enumerate(work):
            start = len(self.rows[i].tokens)
            if n >= n_singles:
                segments.append((i, len(ids), len(new), start))
            ids += new
            rows += [i] * len(new)
            columns += range(start, start + len(new))
            last.append(len(ids) - 1)
        low, high = (rows[0], rows[n_singles - 1] + 1) if n_singles else (0, 0)

        def tensor(numbers):
            return torch.tensor(numbers, dtype=torch.long, device=self.device)

        step = Step(self.store, tensor(rows), tensor(columns), n_singles, low, high,
                     tensor(rows[:n_singles]) - low, max(columns[:n_singles], default=-1) + 1, segments)
        done = [n for n, (i, new) in enumerate(work)
                if len(self.rows[i].tokens) + len(new) == len(self.rows[i].request.ids)]
        # nothing to sample (the middle of a long prompt): one row of logits is computed and dropped
        logits = self.model(input_ids=tensor(ids)[None], position_ids=step.columns[None], use_cache=False,
                            logits_to_keep=tensor([last[n] for n in done] or last[:1]), step=step).logits[0]
        self.steps += 1
        for i, new in work:
            self.rows[i].tokens += new
            self.rows[i].used = self.steps
        self.spent["steps"] += 1
        self.spent["decode_tokens"] += len(done)
        self.spent["prefill_tokens"] += len(ids) - n_singles
        if done:
            requests = [self.rows[work[n][0]].request for n in done]
            tokens, logprobs = _sample(logits.float(), self.temperature, self.top_p,
                                       [request.generator for request in requests])
        for n, token, logprob in zip(done, tokens, logprobs) if done else ():
            row = self.rows[work[n][0]]
            request = row.request
            request.logprobs.append(logprob)
            stopped = token in self.stop
            if not stopped:
                request.ids.append(token)
            if stopped or len(request.logprobs) >= request.limit:
                row.request = None
                request.future.set_result(Generated(
                    request.ids[request.prompt :], stopped, request.reused,
                    sum(request.logprobs) / len(request.logprobs), len(request.logprobs),
                    time.monotonic() - request.admitted))


def _sample(logits, temperature: float, top_p: float, generators: list) -> tuple[list[int], list[float]]:
    """logits [n, V] float32 -> a token per row and its log-probability at temperature 1; temperature 0 is greedy.

    One uniform number per row from that row's own generator picks from the nucleus, tokens in falling order.
    """
    import torch

    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        scaled = logits / temperature
        total = scaled.logsumexp(-1, keepdim=True)
        width = min(64, logits.shape[-1])
        values, order = scaled.topk(width)
        if top_p >= 1 or ((values - total).exp().sum(-1) < top_p).any():  # the nucleus reaches beyond: sort all
            values, order = scaled.sort(-1, descending=True)
        mass = (values - total).exp().double().cumsum(-1)
        inside = (mass < min(top_p, 1.0)).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)  # last of the nucleus
        draws = torch.tensor([torch.rand((), generator=g, dtype=torch.float64).item() for g in generators])
        target = draws.to(mass.device)[:, None] * mass.gather(-1, inside)
        place = torch.minimum((mass <= target).sum(-1, keepdim=True), inside)
        tokens = order.gather(-1, place)[:, 0]
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return tokens.tolist(), logprobs.tolist()


def _common_prefix(one: list[int], other: list[int]) -> int:
    n = 0
    for a, b in zip(one, other):
        if a != b:
            break
        n += 1
    return n


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30
