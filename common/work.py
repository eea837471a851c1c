"""Run many pieces of work at once, keep failures of the machine apart from results, and try those again.

The rule: an InfraError is no result. It is noted, and tried again in up to `retries` further rounds at the end. After
max(4, workers) such ends in a row the whole run stops with one message; in the further rounds, which hold nothing else than
what failed before, only if more is left than `max_infra` allows.
"""

import queue
import threading
from dataclasses import dataclass
from typing import Callable

from common.errors import InfraError, StageError


@dataclass
class Work:
    """How a list of work is run: the number of threads, the rounds of retries, the share that may stay undone."""

    workers: int = 1
    retries: int = 2
    max_infra: float = 0.05
    total: int = 0  # pieces of work in the whole stage, those of earlier runs included

    def run(
        self,
        items: list,
        do: Callable,
        record: Callable,
        ended: Callable,
        failed: Callable,
    ) -> int:
        """Call do(item) for every item on `workers` threads, and here, in this thread, what came of it.

        do(item) gives an iterable of records; record(each) is called as they come, ended(item) after the last one,
        failed(item, error) after an InfraError. Returns how many items are still without a result. Raises StageError if
        those are more than `max_infra` of `total`, or if failures come in a row; any other exception of `do` ends the run.
        """
        allowed = self.max_infra * max(self.total, len(items))
        for number in range(1 + self.retries):
            in_a_row, again = 0, []
            few = number > 0 and len(items) <= allowed
            for what, item, value in self._each(items, do):
                if what == "record":
                    record(value)
                    continue
                if what == "end":
                    in_a_row = 0
                    ended(item)
                    continue
                if not isinstance(value, InfraError):
                    raise value
                again.append(item)
                last = value
                failed(item, value)
                in_a_row += 1
                if in_a_row >= max(4, self.workers) and not few:
                    raise StageError(
                        f"{in_a_row} failures of the machine in a row, the last one: {value}; "
                        "mend it and give the same command again"
                    )
            items = again
            if not items:
                return 0
        if len(items) > allowed:
            raise StageError(
                f"{len(items)} of {self.total} could not be run, more than --max-infra {self.max_infra} allows, the last one: "
                f"{last}; the same command tries them again"
            )
        return len(items)

    def _each(self, items: list, do: Callable):
        """Yield ("record" | "end" | "error", item, value) as they come. An interrupt does not wait for the threads."""
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        came: queue.Queue = queue.Queue(maxsize=self.workers)  # work does not run ahead of what is written
        stop = threading.Event()
        for item in items:
            waiting.put(item)

        def put(*event) -> None:
            while not stop.is_set():
                try:
                    return came.put(event, timeout=0.2)
                except queue.Full:
                    pass

        def loop():
            while not stop.is_set():
                try:
                    item = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    for value in do(item):
                        put("record", item, value)
                    put("end", item, None)
                except BaseException as error:
                    put("error", item, error)

        for _ in range(min(self.workers, len(items))):
            threading.Thread(target=loop, daemon=True).start()
        try:
            left = len(items)
            while left:
                event = came.get()
                left -= event[0] != "record"
                yield event
        finally:
            stop.set()
