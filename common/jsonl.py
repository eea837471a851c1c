"""JSONL files: reading with file and line in every error; one output that can be stopped and gone on with.

While a stage works, its records lie in FILE.part in the order in which they came; `Output.finish` puts them into the
order of the work and renames. So FILE is whole or not there. A torn last line of FILE.part is dropped and redone.
"""

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Callable, Iterator

import jsonlines

from common import schema
from common.errors import InputError


def read(path: str | Path, kind: str | None = None) -> Iterator[dict]:
    """Records of a JSONL file, each validated as `kind` (see schema.TYPES). Raises InputError with file and line."""
    try:
        stream = open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    with stream:
        reader = jsonlines.Reader(stream)  # decodes line by line, so that the number of a damaged one is its own
        number = 0
        while True:
            number += 1
            try:
                record = reader.read(type=dict)
            except EOFError:
                return
            except (jsonlines.InvalidLineError, UnicodeDecodeError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not a JSON object: {str(error)[:200]}") from None
            yield schema.check(record, kind, f"{path}:{number}") if kind else record


def write_atomically(path: str | Path, text: str) -> None:
    """Write a whole small file: temporary name, flush to disk, rename."""
    path = Path(path)
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(half, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


class Output:
    """One JSONL file in the making, by one writer. `key(record)` names the piece of work that a record is for."""

    def __init__(self, path: str | Path, kind: str, key: Callable[[dict], tuple]):
        self.path, self.kind, self.key = Path(path), kind, key
        self.part = self.path.with_name(self.path.name + ".part")
        self.places: dict[tuple, tuple[int, int]] = {}  # key -> (offset, length) in FILE.part
        self.stream = None

    @property
    def finished(self) -> bool:
        return self.path.exists()

    def remove(self) -> None:
        """Forget what an earlier run wrote (--overwrite). Raises InputError if another process is writing it."""
        if self.part.exists():
            self._lock()
            self.close()
        for path in (self.path, self.part, Path(f"{self.path}.infra.jsonl")):
            path.unlink(missing_ok=True)

    def _lock(self) -> None:
        # Unbuffered: what a full disk refused must not come out of a buffer later, in the middle of another line.
        self.stream = open(self.part, "a+b", buffering=0)
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise InputError(
                f"{self.part}: another process is writing this file; wait for it or give another --out"
            ) from None

    def open(self, resumed: bool = False) -> None:
        """Take up FILE.part where it was left. Raises InputError if another process is writing it.

        resumed: this work was begun before. Then a whole FILE is its own: it was finished, but not yet noted as such.
        """
        if resumed and self.finished and not self.part.exists():
            os.replace(self.path, self.part)
        self._lock()
        with open(self.part, "rb") as lines:
            self.stream.truncate(self._index(lines))

    def _index(self, lines) -> int:
        """Note where each whole record lies; return the offset behind the last one."""
        offset = 0
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                print(f"{self.part}:{number}: dropped a torn last line; it is done again", file=sys.stderr)
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise InputError(f"{self.part}:{number}: not a JSON object; --overwrite starts the file again")
            schema.check(record, self.kind, f"{self.part}:{number}")
            self.places[self.key(record)] = (offset, len(line))
            offset += len(line)
        return offset

    def __contains__(self, key: tuple) -> bool:
        return key in self.places

    def append(self, record: dict) -> None:
        """Write one finished record, whole and on disk before this returns."""
        schema.check(record, self.kind, f"{self.path} (about to be written)")
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        offset = self.stream.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):  # an unbuffered write may take a part only
                written += self.stream.write(line[written:])
        except OSError:
            self.stream.truncate(offset)
            raise
        self.places[self.key(record)] = (offset, len(line))

    def records(self, order: list[tuple]) -> Iterator[dict]:
        """The records that are there, in the given order of keys."""
        for key in order:
            if key in self.places:
                offset, length = self.places[key]
                self.stream.seek(offset)
                yield json.loads(self.stream.read(length))

    def finish(self, order: list[tuple]) -> None:
        """Write FILE in the given order of keys, then remove FILE.part."""
        half = self.path.with_name(f"{self.path.name}.tmp")
        with open(half, "wb") as whole:
            for key in order:
                if key in self.places:
                    offset, length = self.places[key]
                    self.stream.seek(offset)
                    whole.write(self.stream.read(length))
            whole.flush()
            os.fsync(whole.fileno())
        os.replace(half, self.path)
        self.part.unlink()
        self.close()

    def close(self) -> None:
        if self.stream:
            self.stream.close()
            self.stream = None
