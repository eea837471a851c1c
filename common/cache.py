"""Answers of a policy by what it was asked, so that nobody is asked the same twice.

    answer, cached = Cache("runs/mine/cache").answer(key("..."), ask)

One SQLite file, DIR/answers.sqlite: safe under several writers and kill -9, and one can look into it with `sqlite3`.
Without a directory the answers of this process alone are kept, in memory.
"""

import dataclasses
import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from common.errors import InputError, StageError
from common.policies import Answer


def key(*asked) -> str:
    """The name of a question: a hash of JSON values."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Cache:
    """Many threads may ask at once; equal questions that come at the same time are asked once.

    fresh: answers that were there before this process are not used, and are replaced. Raises InputError for a
    directory or file that cannot be used.
    """

    def __init__(self, directory: str | Path | None, fresh: bool = False):
        self.path = ":memory:" if directory is None else str(Path(directory) / "answers.sqlite")
        self.fresh = fresh
        self.asked: set[str] = set()  # by this process
        self.locks: dict[str, list] = {}  # key -> [lock, threads that hold it or wait for it]
        self.lock = threading.Lock()
        try:
            if directory is not None:
                Path(directory).mkdir(parents=True, exist_ok=True)
            self.file = sqlite3.connect(self.path, timeout=60.0, check_same_thread=False, isolation_level=None)
            self.file.execute("PRAGMA synchronous=NORMAL")
            self.file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"--cache {directory}: {error}; give another directory, or remove this one") from None

    def answer(self, key: str, ask: Callable[[], Answer]) -> tuple[Answer, bool]:
        """(the answer, whether it was there already); what `ask` raises is passed on and nothing is kept."""
        with self.lock:
            own = self.locks.setdefault(key, [threading.Lock(), 0])
            own[1] += 1
        try:
            with own[0]:
                if (kept := self._get(key)) is not None:
                    return kept, True
                answer = ask()
                self._put(key, answer)
                return answer, False
        finally:
            with self.lock:
                own[1] -= 1
                if not own[1]:
                    del self.locks[key]

    def _get(self, key: str) -> Answer | None:
        if self.fresh and key not in self.asked:
            return None
        found = self._execute("SELECT answer FROM answers WHERE key = ?", key)
        return Answer(**json.loads(found[0][0])) if found else None

    def _put(self, key: str, answer: Answer) -> None:
        text = json.dumps(dataclasses.asdict(answer))
        self._execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, text)
        self.asked.add(key)

    def _execute(self, statement: str, *values: str) -> list[tuple]:
        with self.lock:
            try:
                return self.file.execute(statement, values).fetchall()
            except sqlite3.Error as error:  # a full disk, a damaged file
                raise StageError(f"{self.path}: {error}; what was finished is kept, the same command goes on") from None
