"""Load task instances: the embedded `toy:` tasks, or rows in SWE-bench's format from a file.

    python -m common.tasks toy:dev:3 > tasks.jsonl
    python -m common.tasks toy:dev:3 --unpack repositories > tasks.jsonl
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from common import jsonl, mixing, run, schema
from common.errors import InputError

SPECS = "toy:train, toy:dev, toy:test, toy:study, or a .jsonl, .json or .parquet file; each may end in :N"


def load(spec: str, limit: int | None = None) -> list[dict]:
    """The rows that a task spec names, validated, the first `limit` (or the spec's own :N) of them.

    FAIL_TO_PASS and PASS_TO_PASS come out as lists; relative paths in `local` are taken from the file's directory.
    Raises InputError for an unknown spec, a missing file, a malformed row, a repeated id or an empty list.
    """
    name, _, last = spec.rpartition(":")
    first = int(last) if name and last.isdigit() else None
    name = name if first is not None else spec
    if name.startswith("toy:"):
        from common import toy_tasks

        split = name.removeprefix("toy:")
        if split not in toy_tasks.SIZES:
            raise InputError(f"tasks {spec!r}: no split {split!r}; there are {', '.join(toy_tasks.SIZES)}")
        if first is not None and first > toy_tasks.SIZES[split]:
            raise InputError(f"tasks {spec!r}: {split} has {toy_tasks.SIZES[split]} tasks")
        rows = toy_tasks.load(split, first)
    elif Path(name).suffix in (".jsonl", ".json", ".parquet"):
        rows = [_complete(row, name, place) for place, row in _read(Path(name))]
    else:
        raise InputError(f"tasks {spec!r} is none of {SPECS}")
    _refuse_duplicates(rows, spec)
    for count in (first, limit):
        rows = rows[:count] if count is not None else rows
    if not rows:
        raise InputError(f"tasks {spec!r}: the list is empty")
    return rows


def exclude(rows: list[dict], specs: list[str]) -> tuple[list[dict], int]:
    """Leave out every row that `specs` hold too, by instance_id or by (repo, base_commit). Returns rows, how many went."""
    ids, commits = set(), set()
    for spec in specs:
        for row in load(spec):
            ids.add(row["instance_id"])
            commits.add((row["repo"], row["base_commit"]))
    kept = [r for r in rows if r["instance_id"] not in ids and (r["repo"], r["base_commit"]) not in commits]
    if not kept:
        raise InputError(f"--exclude-tasks {' '.join(specs)} leaves no task")
    return kept, len(rows) - len(kept)


def sample(rows: list[dict], count: int | None, iteration: int, seed: int) -> list[dict]:
    """The tasks of iteration i = 1, 2, ...: places (i-1) count .. i count of a permutation by seed, wrapping round."""
    if count is None:
        return rows
    order = sorted(rows, key=lambda row: mixing.derive("sample", seed, row["instance_id"]))
    start = (max(iteration, 1) - 1) * count
    return [order[place % len(order)] for place in range(start, start + min(count, len(order)))]


def hash_rows(rows: list[dict]) -> str:
    return run.hash_json(rows)


def _read(path: Path):
    if path.suffix == ".jsonl":
        yield from ((f"{path}:{number}", row) for number, row in enumerate(jsonl.read(path), start=1))
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: must hold a list of objects")
    else:
        import pandas

        rows = json.loads(pandas.read_parquet(path).to_json(orient="records"))
    yield from ((f"{path}[{place}]", row) for place, row in enumerate(rows))


def _complete(row: dict, file: str, where: str) -> dict:
    row = dict(row)
    for field in ("FAIL_TO_PASS", "PASS_TO_PASS"):
        if isinstance(row.get(field), str):
            try:
                row[field] = json.loads(row[field])
            except ValueError:
                raise InputError(f"{where}: field {field!r} is neither a list nor a list as JSON text") from None
    schema.check(row, "task", where)
    local = row.get("local")
    if local is not None:
        if "source" not in local:
            raise InputError(f"{where}: field 'local' needs 'source': a directory, tarball or git repository")
        home = Path(file).resolve().parent
        # A link is kept as it is: the python of a virtual environment is one, and means more than what it points to.
        row["local"] = local | {
            name: str(home / local[name]) for name in ("source", "python") if isinstance(local.get(name), str)
        }
        source = row["local"]["source"]
        if isinstance(source, str) and not Path(source).exists():
            raise InputError(f"{where}: {row['instance_id']}: the repository {source} is missing")
    return row


def _refuse_duplicates(rows: list[dict], spec: str) -> None:
    seen = set()
    for row in rows:
        if row["instance_id"] in seen:
            raise InputError(f"tasks {spec!r}: instance_id {row['instance_id']!r} is there twice")
        seen.add(row["instance_id"])


@dataclass
class Args:
    unpack: str | None = None
    """write inline sources as directories below this one, and name those in the rows"""


def _main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(f"usage: python -m common.tasks TASKS [--unpack DIR] > tasks.jsonl\nTASKS: {SPECS}")
    spec = sys.argv.pop(1)

    def work(args: Args) -> None:
        for row in load(spec):
            source = row.get("local", {}).get("source")
            if args.unpack and isinstance(source, dict):
                home = Path(args.unpack) / row["instance_id"]
                for name, text in source.items():
                    (home / name).parent.mkdir(parents=True, exist_ok=True)
                    (home / name).write_text(text)
                row = row | {"local": row["local"] | {"source": str(home)}}
            print(json.dumps(row))

    run.main(Args, work)


if __name__ == "__main__":
    _main()
