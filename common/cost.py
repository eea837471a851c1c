"""What a paid policy costs, and a limit that is not passed.

    meter = Meter(FILE, price="3,0.3,15", max_cost=20.0)
    teacher = meter.watch(teacher)           # the same policy; every answer is noted
    meter.spent                              # dollars, those of earlier calls of the same command included

Each paid answer is a line of FILE.usage.jsonl, written as it comes: so what was paid for a trajectory that was lost (kill
-9, a failure of the machine) is counted too. Not counted: answers that a server made and we never received.
"""

import json
import threading
from pathlib import Path

from common.errors import InputError, StageError
from common.policies import ContextLimit

AROUND = 8  # tokens around a message, at most; in it there are no more than bytes


class Meter:
    """price: "IN,CACHED,OUT", dollars per million tokens of the prompt, of its part that the server had cached, and of the
    answer. Without one nothing is noted. Raises InputError for a price or limit that is none."""

    def __init__(self, out: str | Path, price: str | None, max_cost: float | None):
        self.price = self._parse(price) if price else None
        self.max_cost = max_cost
        if max_cost is not None and self.price is None:
            raise InputError("--max-cost needs --price IN,CACHED,OUT: dollars per million tokens")
        self.path = Path(f"{out}.usage.jsonl")
        self.spent = 0.0
        self.reserved, self.underway = 0.0, 0  # what the answers on their way may cost at most; how many these are
        self.full = False
        self.stream = None
        self.change = threading.Condition()

    @staticmethod
    def _parse(price: str) -> tuple[float, float, float]:
        try:
            given = tuple(float(part) for part in price.split(","))
        except ValueError:
            given = ()
        if len(given) != 3 or not all(0 <= part < float("inf") for part in given):
            raise InputError(f"--price {price}: wanted IN,CACHED,OUT, dollars per million tokens, as 3,0.3,15")
        return given

    def open(self, overwrite: bool = False) -> None:
        """Take up what earlier calls have spent. Call it where the output is opened."""
        if self.price is None:
            return
        if overwrite:
            self.path.unlink(missing_ok=True)
        if self.path.exists():
            text = self.path.read_text()
            if text and not text.endswith("\n"):  # torn by a kill: what follows is not to join it
                with open(self.path, "a", encoding="utf-8") as stream:
                    stream.write("\n")
            for line in text.splitlines():
                try:
                    usage = json.loads(line)
                except ValueError:
                    continue
                self.spent += self.cost(usage["in"], usage["cached"], usage["out"])
        self.stream = open(self.path, "a", encoding="utf-8", buffering=1)

    def cost(self, tokens_in: int, tokens_cached: int, tokens_out: int) -> float:
        """Dollars."""
        fresh = max(0, tokens_in - tokens_cached)
        return (fresh * self.price[0] + tokens_cached * self.price[1] + tokens_out * self.price[2]) / 1e6

    def watch(self, policy):
        """`policy` itself where it is free or without a price, else one that notes what each answer cost."""
        return policy if self.price is None or policy.free else _Watched(policy, self)

    def summary(self) -> dict:
        """{"cost": dollars}, empty without a price."""
        return {} if self.price is None else {"cost": self.spent}

    def reserve(self, most_in: int, most_out: int) -> float:
        """Set aside what a request may cost at most (tokens), and return it.

        Waits for others that are underway; raises StageError where even without them the limit could be passed.
        """
        most = self.cost(most_in, 0, most_out)
        with self.change:
            while self.max_cost is not None and (self.full or self.spent + self.reserved + most > self.max_cost):
                if self.full or not self.underway:
                    self.full = True  # for smaller ones as well: the script ends now, and would not hear their answers
                    raise StageError(
                        f"--max-cost {self.max_cost:g}: {self.spent:.4f} are spent, and the next request may cost up to "
                        f"{most:.4f}; the same command with a higher --max-cost goes on"
                    )
                self.change.wait()
            self.reserved, self.underway = self.reserved + most, self.underway + 1
        return most

    def settle(self, reserved: float, tokens: tuple[int, int, int] | None) -> None:
        """The request has ended; tokens (in, cached, out) of its answer, None where there was none."""
        with self.change:
            self.underway -= 1
            self.reserved = self.reserved - reserved if self.underway else 0.0
            if tokens:
                self.spent += self.cost(*tokens)
                self.stream.write(json.dumps(dict(zip(("in", "cached", "out"), tokens))) + "\n")
            self.change.notify_all()


class _Watched:
    """A policy whose answers are paid for."""

    def __init__(self, policy, meter: Meter):
        self.policy, self.meter = policy, meter

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def act(self, row: dict, messages: list[dict], **where):
        sent = sum(len(m["content"].encode()) for m in messages)
        most = sent + AROUND * (len(messages) + 1)
        reserved, tokens = self.meter.reserve(most, self.policy.sampling["max_new_tokens"]), None
        try:
            answer = self.policy.act(row, messages, **where)
            tokens = (
                answer.tokens_in if answer.tokens_in is not None else sent // 4,
                answer.tokens_cached or 0,
                answer.tokens_out if answer.tokens_out is not None else len(answer.text) // 4,
            )
            return answer
        except ContextLimit as limit:
            tokens = limit.tokens
            raise
        finally:
            self.meter.settle(reserved, tokens)
