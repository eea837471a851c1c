"""`vllm:`: a server of our own, started with the first question unless one runs (common/serve.py)."""

import http.client
import threading

from common import models, serve
from common.chat import THINK, harmless, special_tokens
from common.errors import InfraError, InputError
from common.hf_policy import hash_adapter
from common.openai_policy import OpenAIPolicy, check_options
from common.policies import Answer, Plain

# A model's generation_config.json may ask for these, and vLLM would follow it: what samples is what the record says.
PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
RESTARTS = 3  # of a server that dies while this process uses it


class VllmPolicy(Plain):
    """MODEL[,adapter=DIR][,gpus=0+1][,util=0.4][,args=...]; asks its server as OpenAIPolicy does.

    If the server dies, a new one is started, and what was asked is asked again; one that was started by hand is not.
    Of args, the record names --quantization alone: the rest is taken to say only how. An adapter that was trained on an
    NF4 base is served on the plain one, unless args=--quantization bitsandbytes.
    """

    free = False

    def __init__(self, rest: str, role: str, sampling: dict, max_context: int | None, *, extra: dict, inflight: int,
                 keep_reasoning: bool):  # fmt: skip
        """Raises InputError for a bad spec; the first question starts a server."""
        super().__init__(sampling)
        check_options(role, extra, inflight)
        self.spec = serve.parse(rest)
        self.name, self.extra = f"vllm:{self.spec.model}", PLAIN_SAMPLING | extra
        self.adapter_hash = hash_adapter(self.spec.adapter) if self.spec.adapter else None
        self.role, self.max_context, self.inflight, self.keep_reasoning = role, max_context, inflight, keep_reasoning
        self.lock, self.specials = threading.Lock(), None
        self.server, self.restarts = None, 0
        self.clients: list[OpenAIPolicy] = []  # one for each server: threads may still wait for the last one

    def describe(self) -> dict:
        return super().describe() | {
            "adapter": self.spec.adapter, "adapter_hash": self.adapter_hash,
            "quantisation": self.spec.option("--quantization", "-q") or "none",
            **({"keep_reasoning": True} if self.keep_reasoning else {})}  # fmt: skip

    def act(self, row: dict, messages: list[dict], *, seed: int, episode: str, turn: int, attempt: int) -> Answer:
        messages = [m | {"content": harmless(m["content"], self._specials())} for m in messages]
        while True:
            server, client = self._connect()
            try:
                return client.act(row, messages, seed=seed, episode=episode, turn=turn, attempt=attempt)
            except InfraError:
                if server.alive():
                    raise

    def _specials(self) -> list[str]:
        """The model's special tokens: 03_train.py makes them inert wherever they stand in a text, so they are for the server.

        None where the tokenizer is not to be had here.
        """
        with self.lock:
            if self.specials is None:
                try:
                    tokenizer, _ = models.load_tokenizer(self.spec.model)
                    self.specials = [token for token in special_tokens(tokenizer) if token not in THINK]
                except InputError:
                    self.specials = []
            return self.specials

    def _connect(self) -> tuple[serve.Server, OpenAIPolicy]:
        """A server that is alive, and who asks it. Raises InfraError if it died and does not come back."""
        with self.lock:
            if self.server is None or not self.server.alive():
                server = self._again() if self.server else serve.start(self.spec)
                try:
                    self._refuse_short(server)
                    model = server.adapter(self.spec.adapter) if self.spec.adapter else self.spec.model
                except (OSError, http.client.HTTPException) as error:
                    raise InfraError(f"{self.name}: its server does not answer as it should: {error}") from None
                client = OpenAIPolicy(f"{model}@{server.url}", self.role, self.sampling, self.max_context, key_env=None,
                                      extra=self.extra, inflight=self.inflight,
                                      keep_reasoning=self.keep_reasoning)  # fmt: skip
                client.key, client.name = server.key, self.name
                self.server = server
                self.clients.append(client)
            return self.server, self.clients[-1]

    def _refuse_short(self, server: serve.Server) -> None:
        """vLLM makes the context as long as memory allows and cuts off what does not fit: that would look like the model."""
        longest = server.context()
        if self.max_context and longest and longest < self.max_context:
            raise InputError(f"{self.name}: its server has room for conversations of {longest} tokens, and --max-context is "
                             f"{self.max_context}: give it more memory (util=, more gpus=), or lower --max-context here and "
                             "in 03_train.py")  # fmt: skip

    def _again(self) -> serve.Server:
        """Another server after one that died; who started that one by hand has to start the other one too."""
        by_hand = self.server.stays
        if not (serve.find(self.spec) if by_hand else self.restarts < RESTARTS):
            how = "python -m common.serve start brings it back" if by_hand else f"it was started again {RESTARTS} times"
            raise InfraError(f"{self.name}: the server died: {serve.last_words(self.spec.folder)}; {how}")
        self.restarts += 1
        return serve.start(self.spec)

    def close(self) -> None:
        for client in self.clients:
            client.close()
