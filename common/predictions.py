"""Reads predictions: the patches that somebody made, in any of the three forms that are about."""

import json
from pathlib import Path
from typing import Iterator

from common import jsonl, schema
from common.errors import InputError


def read(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(where it stands, the prediction) for each of a file, validated.

    A .json file holds a list of predictions, or, as mini-swe-agent writes it, an object instance_id -> prediction; any
    other file is JSONL. Raises InputError that names the file and the line, the place in the list or the id.
    """
    if Path(path).suffix != ".json":
        for number, record in enumerate(jsonl.read(path, "prediction"), start=1):
            yield f"{path}:{number}", record
        return

    def members(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]  # json itself would keep the last of two and say nothing
        if twice := [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []:
            raise InputError(f"{path}: {twice[0]!r} is there twice")
        return dict(pairs)

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=members)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, (list, dict)):
        raise InputError(f"{path}: neither a list of predictions nor an object instance_id -> prediction")
    for place, record in content.items() if isinstance(content, dict) else enumerate(content):
        where = f"{path}[{place!r}]"
        if not isinstance(record, dict):
            raise InputError(f"{where}: must be a prediction, an object, not {type(record).__name__}")
        if isinstance(content, dict):
            record = {"instance_id": place} | record
            if record["instance_id"] != place:
                raise InputError(f"{where}: instance_id is {record['instance_id']!r}")
        yield where, schema.check(record, "prediction", where)
