"""Load task instances: the embedded `toy:` tasks, or rows in SWE-bench's format from a file or a data set.

    python -m common.tasks toy:dev:3 > tasks.jsonl
    python -m common.tasks toy:dev:3 --unpack repositories > tasks.jsonl
    python -m common.tasks swe-bench-verified:10 > tasks.jsonl
    python -m common.tasks swe-gym:holdout > holdout.jsonl

Data sets come through the package `datasets`, which downloads them from the Hugging Face Hub and keeps them. A row
without `local` of a repository of SWE-bench or SWE-Gym gets the fields that a container and official grading need
(common/repositories.py), so what this prints is a data set for `swebench eval` too.

`swe-gym:holdout` is 100 of SWE-Gym's 2,438 tasks, `swe-gym:train` all the others, as in the paper (arXiv 2605.12913).
The paper's own list is not published. Ours is common/swe_gym_holdout.txt: of the 2,119 ids that OpenHands found to be
solvable in their images (its file swegym_verified_instances.json), the 100 with the smallest sha256 of
"swe-gym-holdout:0:ID", where 0 is the seed.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from common import jsonl, mixing, repositories, repository, run, schema
from common.errors import InputError, StageError

SPECS = (
    "toy:train|dev|test|study (and train2|dev2|study2), swe-bench-verified, swe-bench-lite, swe-gym:train|holdout, swe-gym-lite, "
    "dataset:NAME:SPLIT, or a .jsonl, .json or .parquet file; each may end in :N"
)
DATASETS = {  # spec -> the data set's name on the hub, its split
    "swe-bench-verified": ("SWE-bench/SWE-bench_Verified", "test"),
    "swe-bench-lite": ("SWE-bench/SWE-bench_Lite", "test"),
    "swe-gym:train": ("SWE-Gym/SWE-Gym", "train"),
    "swe-gym:holdout": ("SWE-Gym/SWE-Gym", "train"),
    "swe-gym-lite": ("SWE-Gym/SWE-Gym-Lite", "train"),
}
# What a row with `local` may leave out, all together, where a patch is wanted and nothing is to be graded; repo and
# base_commit (of a git repository: HEAD) are then optional, too.
UNGRADED = {"patch": "", "test_patch": "", "FAIL_TO_PASS": [], "PASS_TO_PASS": []}


def load(spec: str, limit: int | None = None) -> list[dict]:
    """The rows that a task spec names, validated, the first `limit` (or the spec's own :N) of them.

    FAIL_TO_PASS and PASS_TO_PASS come out as lists; relative paths in `local` are taken from the file's directory; rows
    of known repositories are completed (repositories.complete), and so are rows that want a patch alone (UNGRADED).
    Raises InputError for an unknown spec, a missing file or data set, a malformed row, a repeated id or an empty list;
    StageError if the hub cannot be reached.
    """
    name, _, last = spec.rpartition(":")
    first = int(last) if name and last.isascii() and last.isdigit() else None
    name = name if first is not None else spec
    if name.startswith("toy:"):
        from common import toy_tasks

        split = name.removeprefix("toy:")
        if split not in toy_tasks.SIZES:
            raise InputError(f"tasks {spec!r}: no split {split!r}; there are {', '.join(toy_tasks.SIZES)}")
        if first is not None and first > toy_tasks.SIZES[split]:
            raise InputError(f"tasks {spec!r}: {split} has {toy_tasks.SIZES[split]} tasks")
        rows = toy_tasks.load(split, first)
    elif name in DATASETS or name.startswith("dataset:"):
        rows = _from_dataset(name, spec)
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
            if row["base_commit"]:  # a plain directory has none: its name alone says nothing
                commits.add((row["repo"], row["base_commit"]))
    kept = [r for r in rows if r["instance_id"] not in ids and (r["repo"], r["base_commit"]) not in commits]
    if not kept:
        raise InputError(f"--exclude-tasks {' '.join(specs)} leaves no task")
    if out := len(rows) - len(kept):
        print(f"{out} of {len(rows)} tasks are left out: {' '.join(specs)} have them, or their repository at that commit",
              file=sys.stderr)  # fmt: skip
    return kept, len(rows) - len(kept)


def sample(rows: list[dict], count: int | None, iteration: int, seed: int) -> list[dict]:
    """The tasks of iteration i = 1, 2, ...: places (i-1) count .. i count of a permutation by seed, wrapping round."""
    if count is None:
        return rows
    order = sorted(rows, key=lambda row: mixing.derive("sample", seed, row["instance_id"]))
    start = (max(iteration, 1) - 1) * count
    return [order[place % len(order)] for place in range(start, start + min(count, len(order)))]


def hash_rows(rows: list[dict]) -> str:
    """Of the tasks' contents: what local repositories hold is a part of them, where they and interpreters lie is not."""
    trees: dict[str, str] = {}

    def contents(row: dict) -> dict:
        local = row.get("local")
        if not isinstance(local, dict) or not isinstance(local.get("source"), str):
            return row
        source = local["source"]
        if source not in trees:  # of a git repository base_commit says it
            trees[source] = "git" if repository.is_git(Path(source)) else _hash_tree(Path(source))
        return row | {"local": {name: value for name, value in local.items() if name != "python"} | {"source": trees[source]}}

    return run.hash_json([contents(row) for row in rows])


def _hash_tree(source: Path) -> str:
    """Of a tarball, or of the names and contents in a directory."""
    if source.is_file():
        return run.hash_file(source)
    paths = sorted(path for path in source.rglob("*") if path.is_symlink() or path.is_file())
    return run.hash_json([(str(path.relative_to(source)), os.readlink(path) if path.is_symlink() else run.hash_file(path))
                          for path in paths])  # fmt: skip


def held_out_ids() -> set[str]:
    """The 100 of SWE-Gym's ids that `swe-gym:holdout` has and `swe-gym:train` has not."""
    return set(Path(__file__).with_name("swe_gym_holdout.txt").read_text().split())


def _from_dataset(name: str, spec: str) -> list[dict]:
    hub, split = DATASETS.get(name) or name.removeprefix("dataset:").partition(":")[::2]
    if not hub or not split:
        raise InputError(f"tasks {spec!r}: a data set is dataset:NAME:SPLIT")
    table = _load_dataset(hub, split)
    # what JSON does not know (dates) becomes text
    rows = [json.loads(json.dumps(row, default=str)) for row in table]
    rows = [_complete(row, ".", f"{hub}:{split}[{place}]") for place, row in enumerate(rows)]
    if name.startswith("swe-gym:"):
        held_out = held_out_ids()
        if missing := held_out - {row["instance_id"] for row in rows}:
            print(f"warning: {hub} has {len(missing)} of the {len(held_out)} held-out tasks no more", file=sys.stderr)
        rows = [row for row in rows if (row["instance_id"] in held_out) == (name == "swe-gym:holdout")]
    return rows


def _load_dataset(name: str, split: str):
    """One split of a data set: of the hub, of the cache, or of a local directory."""
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise InputError("data sets need the package `datasets` (pip install -r requirements.txt)") from None
    huggingface_hub.logging.set_verbosity_error()  # else every retry is a line
    try:
        return datasets.load_dataset(name, split=split)
    except (ValueError, FileNotFoundError) as error:  # no such name, no such split, or not for everybody
        raise InputError(f"data set {name!r}, split {split!r}: {_first_line(error)}") from None
    except Exception as error:  # the hub's and the network's errors are of many kinds
        raise StageError(
            f"data set {name!r} could not be loaded ({_first_line(error)}): try again where the Hugging Face Hub can "
            "be reached, or give its rows as a .jsonl, .json or .parquet file"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read(path: Path):
    if path.suffix == ".jsonl":
        yield from ((f"{path}:{number}", row) for number, row in enumerate(jsonl.read(path), start=1))
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON: {error}") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: must hold a list of objects")
    else:
        import pandas

        try:
            rows = json.loads(pandas.read_parquet(path).to_json(orient="records"))
        except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
            raise InputError(f"{path}: not a parquet file that can be read: {_first_line(error)}") from None
    yield from ((f"{path}[{place}]", row) for place, row in enumerate(rows))


def _complete(row: dict, file: str, where: str) -> dict:
    row = {name: value for name, value in row.items() if (name, value) != ("local", None)}  # as tables fill a column up
    for field in ("FAIL_TO_PASS", "PASS_TO_PASS"):
        if isinstance(row.get(field), str):
            try:
                row[field] = json.loads(row[field])
            except (ValueError, RecursionError):
                raise InputError(f"{where}: field {field!r} is neither a list nor a list as JSON text") from None
    home, local = Path(file).resolve().parent, row.get("local")
    if isinstance(local, dict) and isinstance(local.get("source"), str) and not row.keys() & UNGRADED.keys():
        source = home / local["source"]
        row = UNGRADED | {"repo": source.name, "base_commit": repository.commit(source) or ""} | row
    schema.check(row, "task", where)
    if local is not None:
        _check_local(local, where)
        # A link is kept as it is: the python of a virtual environment is one, and means more than what it points to.
        row["local"] = local | {
            name: str(home / local[name]) for name in ("source", "python") if isinstance(local.get(name), str)
        }
        source = row["local"]["source"]
        if isinstance(source, str):
            if not Path(source).exists():
                raise InputError(f"{where}: {row['instance_id']}: the repository {source} is missing")
            # A name of a commit may mean another one tomorrow.
            row["base_commit"] = repository.commit(Path(source), row["base_commit"]) or row["base_commit"]
    return repositories.complete(row)


def _check_local(local: dict, where: str) -> None:
    def texts(value: object) -> bool:
        return isinstance(value, dict) and all(isinstance(one, str) for pair in value.items() for one in pair)

    if not (texts(local.get("source")) or isinstance(local.get("source"), str)) or local["source"] == "":
        raise InputError(f"{where}: field 'local' needs 'source': a directory, tarball or git repository")
    for name in ("python", "test_cmd", "log_parser"):
        if not isinstance(local.get(name), str | None):
            raise InputError(f"{where}: field 'local': {name} must be a text, not {type(local[name]).__name__}")
    setup, env = local.get("setup") or [], local.get("env") or {}
    if not isinstance(setup, list) or not all(isinstance(command, str) for command in setup):
        raise InputError(f"{where}: field 'local': setup must be a list of commands")
    if not isinstance(env, dict) or not all(isinstance(value, str | int | float) for value in env.values()):
        raise InputError(f"{where}: field 'local': env must be an object of names and texts")
    if bad := [name for name, value in env.items() if not name or "=" in name or "\0" in f"{name}{value}"]:
        raise InputError(f"{where}: field 'local': env: {bad[0]!r} cannot be a variable of the environment")


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
                home = (Path(args.unpack) / row["instance_id"]).absolute()
                repository.write_inline(home, source, f"{row['instance_id']}: local.source")
                row = row | {"local": row["local"] | {"source": str(home)}}
            print(json.dumps(row))

    run.main(Args, work)


if __name__ == "__main__":
    _main()
