"""A teacher label for one visited state: asked for until it is a good action, and no state is asked twice.

02_relabel.py writes labels; 01_collect.py --inline asks the same questions while the agent's commands run, so that 02
finds the answers in the cache.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from common import actions, cache, mixing, prompts
from common.chat import harmless
from common.errors import InfraError, StageError
from common.policies import ContextLimit

TRIES = 3
log = logging.getLogger("swe-dagger")


class Labeller:
    """Asks `teacher`, through `answers`. One for a whole stage, many threads. `count` gives the tokens of a text where
    the teacher does not."""

    def __init__(self, teacher, answers: cache.Cache, seed: int, count: Callable[[str], int]):
        self.teacher, self.answers, self.seed, self.count = teacher, answers, seed, count
        self.described = teacher.describe()
        self.down = False  # Ahead asks no more

    def label(self, row: dict, prompt: str, state: list[dict], *, episode: str, turn: int, attempt: int) -> dict:
        """The teacher's action at `state` (messages of role and content), as the fields of a label record.

        row: needs instance_id and base_commit. prompt: version of the prompts. A label that is cut off, empty or without exactly
        one command is asked for again, twice; then it is not valid. The seed of the sampling hangs on the state alone,
        so equal states have equal labels, whichever comes first. Raises InfraError where the teacher cannot be reached.
        """
        asked = cache.key(self.described, prompt, state)
        if not self.teacher.answers_states:
            asked = cache.key(asked, row["instance_id"], attempt, turn)
        tokens, seconds, text, thought, cached = {"in": 0, "cached": 0, "out": 0}, 0.0, "", None, True
        for number in range(TRIES):
            seed = mixing.derive("sample", self.seed, asked, "teacher", "label", number)
            try:
                answer, was_there = self.answers.answer(
                    cache.key(asked, number, *filter(None, [self.teacher.code])),
                    lambda: self.teacher.act(row, state, seed=seed, episode=episode, turn=turn, attempt=attempt),
                )
            except ContextLimit:
                reason, cached = "the state exceeds the teacher's context", False
                break
            if not was_there:
                cached = False
                out = self.count(answer.text) if answer.tokens_out is None else answer.tokens_out
                for name, number_of in (("in", answer.tokens_in), ("cached", answer.tokens_cached), ("out", out)):
                    tokens[name] += number_of or 0
                seconds += answer.seconds
            text, thought = harmless(answer.text), answer.reasoning
            reason = actions.wrong_with(text, answer.finish_reason)
            if reason is None:
                break
        return {
            "label": text,
            "valid": reason is None,
            "reason": reason,
            "source": "cache" if cached else "queried",
            "tokens": tokens,
            "seconds": round(seconds, 3),
        } | ({"reasoning": thought} if thought else {})


class Ahead:
    """Labels of one trajectory's states, asked for beside the trajectory, in the order of its turns."""

    def __init__(self, labeller: Labeller, pool: ThreadPoolExecutor, row: dict, episode: str, attempt: int):
        self.labeller, self.pool, self.row, self.prompt = labeller, pool, row, prompts.version(row)
        self.episode, self.attempt = episode, attempt
        self.last: Future | None = None
        self.asked = {"labels": 0, "in": 0, "cached": 0, "out": 0, "seconds": 0.0}  # those that were in no cache

    def ask(self, turn: int, state: list[dict]) -> None:
        """Have this state labelled; returns at once."""
        before = self.last

        def label() -> None:
            if before:
                before.result()
            if self.labeller.down:
                return
            try:
                made = self.labeller.label(self.row, self.prompt, state, episode=self.episode, turn=turn,
                                           attempt=self.attempt)  # fmt: skip
            except (InfraError, StageError) as error:  # a server that is down, --max-cost: no reason to lose a trajectory
                if not self.labeller.down:
                    self.labeller.down = True
                    log.warning("no more labels are asked for ahead, 02_relabel.py asks for the rest: %s", error)
                return
            for name, number in (made["tokens"] | {"seconds": made["seconds"]}).items():
                self.asked[name] += number
            self.asked["labels"] += made["source"] == "queried"

        self.last = self.pool.submit(label)

    def wait(self) -> None:
        """Until all are answered. Raises InputError where the teacher can never answer."""
        if self.last:
            self.last.result()
