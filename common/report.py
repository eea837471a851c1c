"""One self-contained HTML page of one or several runs: the numbers, and every trajectory turn by turn.

    python -m common.report runs/laptop
    python -m common.report runs/dagger runs/sft --out comparison.html

The page opens from disk and loads nothing: its style, its script (report.* and report_viewer.js beside this file) and
its data are in it, and a content security policy forbids it all else. What models and programs wrote is data: JSON
inside script elements that are no scripts, gzipped and in base64 but for the index (which trajectories there are, ids
in plain text). The page unpacks a chunk of some dozens of trajectories when one of them is opened.

Every number comes from common/metrics.py. What a run has not got yet is shown as missing. The page is written to a
temporary name first, so a reader never sees half of one. In memory is one chunk, the index and the issues' texts.
"""

import base64
import contextlib
import gzip
import hashlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from common import failures, jsonl, metrics, run, schema
from common.errors import InputError

CHUNK = 2_000_000  # bytes of JSON; the page unpacks this much to show one trajectory
CHUNK_TRAJECTORIES = 64
TITLE = 160  # characters of an issue in the index; a search covers all of it
FAILED_TESTS = 50  # names of failed tests shown with a trajectory
SPENT = ("tokens", "minutes", "dollars")
FIELDS = (
    "chunk", "position", "run", "place", "what", "iteration", "instance_id", "trajectory_id", "issue", "turns",
    "student_turns", "teacher_turns", "judged", "differ", "resolved", "failure_mode", "exit_status",
)  # fmt: skip


@dataclass(kw_only=True)
class Args:
    out: str | None = None
    """the page to write (default: report.html in the run's directory; several runs need it)"""


# ---------------------------------------------------------------- trajectories


@dataclass
class Source:
    """One trajectories file of a run, with what belongs to its trajectories."""

    place: str  # in the run's directory
    what: str  # collected, evaluated, test, teacher
    trajectories: Path
    labels: Path
    results: Path
    manifest: Path


def sources(home: Path) -> Iterator[Source]:
    """The finished trajectories files of a run, in the order in which the loop writes them."""
    found = []
    for path in sorted(home.glob("iter_[0-9][0-9][0-9]")):
        grades = path / "grades/results.jsonl"
        found.append(Source(path.name, "collected", path / "trajectories.jsonl", path / "labels.jsonl", grades,
                            path / "trajectories.jsonl.manifest.json"))  # fmt: skip
        found.append(_evaluation(path / "eval", f"{path.name}/eval", "evaluated"))
    found.append(_evaluation(home / "teacher/eval", "teacher/eval", "teacher"))
    found += [_evaluation(path, f"test/{path.name}", "test") for path in sorted(home.glob("test/iter_[0-9][0-9][0-9]"))]
    return (source for source in found if source.trajectories.exists())


def _evaluation(path: Path, place: str, what: str) -> Source:
    files = [path / name for name in ("trajectories.jsonl", "labels.jsonl", "results.jsonl", "manifest.json")]
    return Source(place, what, *files)


class Labels:
    """The labels of one file by trajectory. In memory is where they lie, not what they say."""

    def __init__(self, path: Path):
        self.places: dict[str, list[list[int]]] = {}  # trajectory_id -> [start, end] in the file; mostly one
        self.stream = open(path, "rb") if path.exists() else None
        offset = 0
        for number, line in enumerate(self.stream or (), start=1):
            try:
                record = schema.check(json.loads(line), "label", f"{path}:{number}")
            except ValueError:
                raise InputError(f"{path}:{number}: not a JSON object") from None
            places = self.places.setdefault(record["trajectory_id"], [])
            if places and places[-1][1] == offset:
                places[-1][1] += len(line)
            else:
                places.append([offset, offset + len(line)])
            offset += len(line)

    def of(self, trajectory_id: str) -> dict[int, dict]:
        """turn -> label."""
        found = {}
        for start, end in self.places.get(trajectory_id, ()):
            self.stream.seek(start)
            for line in self.stream.read(end - start).splitlines():
                label = json.loads(line)
                found[label["turn"]] = label
        return found


class Results:
    """trajectory_id -> what grading said."""

    def __init__(self, path: Path):
        self.found = {}
        for record in jsonl.read(path, "result") if path.exists() else ():
            self.found[record["trajectory_id"]] = {
                "resolved": record["resolved"],
                "failure_mode": record["failure_mode"],
                "tampered": record["tampered"],
                "tests": _tests(record["tests_status"]),
            }

    def of(self, trajectory_id: str) -> dict:
        return self.found.get(trajectory_id, {"resolved": None, "failure_mode": None, "tampered": False, "tests": None})


class Gold:
    """Gold patches, where they are at hand: of tasks in JSONL files, and of the toy tasks that a student is scored on.

    Those that were collected on are too many to be generated again (5 ms each), and the labels say what to repair.
    """

    def __init__(self, source: Source):
        settings = json.loads(source.manifest.read_text())["settings"] if source.manifest.exists() else {}
        self.toys = source.what != "collected"
        self.found = {}
        name = re.sub(r":\d+$", "", settings.get("tasks") or "")
        if name.endswith(".jsonl") and Path(name).is_file():
            self.found = {
                row.get("instance_id"): (row.get("base_commit"), row.get("patch")) for row in jsonl.read(name)
            }

    def of(self, trajectory: dict) -> str | None:
        commit, patch = self.found.get(trajectory["instance_id"], (None, None))
        if commit == trajectory["base_commit"]:
            return patch
        if self.toys and trajectory["instance_id"].startswith("toy-"):
            from common import toy_tasks

            with contextlib.suppress(InputError):  # a task of another version of the generator
                return toy_tasks.find(trajectory).row["patch"]
        return None


def _tests(status: dict) -> dict | None:
    """SWE-bench's lists of test names, as counts and the names of the failed ones."""
    groups = [group for group in status.values() if isinstance(group, dict)]
    failed = [name for group in groups for name in group.get("failure", ())]
    passed = sum(len(group.get("success", ())) for group in groups)
    return {"passed": passed, "failures": len(failed), "failed": failed[:FAILED_TESTS]} if failed or passed else None


def opened(trajectory: dict, labels: dict[int, dict], result: dict, gold: str | None) -> dict:
    """What the page shows of one trajectory."""
    messages = trajectory["messages"]
    first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    said = {
        role: "\n\n".join(m["content"] for m in messages[:first] if m["role"] == role) for role in ("system", "user")
    }
    turns = []
    for message in messages[first:]:
        if message["role"] == "assistant":
            turns.append(_turn(message, labels.get(message["turn"])))
        else:  # what came back; mostly one message
            before = turns[-1]["observation"]
            turns[-1]["observation"] = message["content"] if before is None else f"{before}\n\n{message['content']}"
            turns[-1]["observation_seconds"] = message.get("seconds", 0)
            turns[-1]["truncated"] = bool(message.get("truncated"))
    return {
        "issue": said["user"],
        "system": said["system"],
        "turns": turns,
        "patch": trajectory["patch"],
        "gold": gold,
        "tests": result["tests"],
        "tampered": result["tampered"],
        "mix": trajectory["mix"],
        "beta": trajectory.get("beta"),
        "kappa": trajectory.get("kappa"),
        "student": policy_name(trajectory["student"]),
        "teacher": policy_name(trajectory["teacher"]),
        "seconds": trajectory["finished"] - trajectory["started"],
    }


def _turn(message: dict, label: dict | None) -> dict:
    kept = ("actor", "command", "finish_reason", "logprob", "seconds", "reasoning")
    shown = {name: message[name] for name in kept if message.get(name) is not None}
    shown |= {"command": message["command"], "text": message["content"], "tokens": message["tokens"].get("out")}
    shown |= {"observation": None}
    if label:
        same = label["label"] == message["content"]
        shown["label"] = {name: label[name] for name in ("valid", "reason", "agrees", "source")}
        shown["label"]["text"] = None if same else label["label"]
    return shown


def policy_name(policy: dict | None) -> str | None:
    """Model and the end of the adapter's path: .../iter_001/adapter."""
    if policy is None:
        return None
    adapter = policy.get("adapter")
    return f"{policy.get('model')} + {'/'.join(Path(adapter).parts[-2:])}" if adapter else str(policy.get("model"))


class Collection:
    """All trajectories of the page: rows of the index in memory, the rest packed in `spool`, a file on disk."""

    def __init__(self, spool):
        self.spool = spool
        self.rows: list[list] = []
        self.issues: dict[str, int] = {}
        self.chunks = 0
        self.raw = 0  # bytes of JSON
        self.texts: list[str] = []  # of the chunk in the making

    def add_run(self, number: int, home: Path) -> None:
        for source in sources(home):
            labels, results = Labels(source.labels), Results(source.results)
            gold = Gold(source)
            for trajectory in jsonl.read(source.trajectories, "trajectory"):
                name = trajectory["trajectory_id"]
                self.add(number, source, trajectory, labels.of(name), results.of(name), gold.of(trajectory))

    def add(
        self, number: int, source: Source, trajectory: dict, labels: dict[int, dict], result: dict, gold: str | None
    ):
        shown = opened(trajectory, labels, result, gold)
        if source.what == "teacher":  # 04_eval.py calls whomever it scores the student
            shown |= {"mix": "teacher", "teacher": shown["student"], "student": None}
            for turn in shown["turns"]:
                turn["actor"] = "teacher"
        actors = [turn["actor"] for turn in shown["turns"]]
        judged = [label["agrees"] for label in labels.values() if label["agrees"] is not None]
        values = {
            "chunk": self.chunks,
            "position": len(self.texts),
            "run": number,
            "place": source.place,
            "what": source.what,
            "iteration": trajectory["iteration"],
            "instance_id": trajectory["instance_id"],
            "trajectory_id": trajectory["trajectory_id"],
            "issue": self.issues.setdefault(shown["issue"], len(self.issues)),
            "turns": len(actors),
            "student_turns": actors.count("student"),
            "teacher_turns": actors.count("teacher"),
            "judged": len(judged),
            "differ": judged.count(False),
            "resolved": result["resolved"],
            "failure_mode": result["failure_mode"],
            "exit_status": trajectory["exit_status"],
        }
        self.rows.append([values[field] for field in FIELDS])
        self.texts.append(json.dumps(run.finite(shown), separators=(",", ":")))
        if len(self.texts) == CHUNK_TRAJECTORIES or sum(map(len, self.texts)) >= CHUNK:
            self.flush()

    def flush(self) -> None:
        if self.texts:
            self._pack("[" + ",".join(self.texts) + "]")
            self.texts = []

    def finish(self) -> dict:
        """The index: what the page's list needs."""
        self.flush()
        issues, more = list(self.issues), None
        if any(len(issue) > TITLE for issue in issues):
            more = self.chunks
            self._pack(json.dumps(issues, separators=(",", ":")))
        return {"fields": FIELDS, "rows": self.rows, "issues": [issue[:TITLE] for issue in issues], "more_issues": more}

    def _pack(self, text: str) -> None:
        packed = base64.b64encode(gzip.compress(text.encode("ascii"), compresslevel=6, mtime=0))
        self.raw += len(text)
        self.spool.write(b'<script type="application/octet-stream" id="chunk-%d">%s</script>\n' % (self.chunks, packed))
        self.chunks += 1


# ---------------------------------------------------------------- the page


def as_json(value: object) -> str:
    """JSON that can stand in a script element of an HTML page: nothing in it ends the element or a line of a script."""
    text = json.dumps(run.finite(value), ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def template() -> dict[str, str]:
    """The page's parts: html, css, js."""
    here = Path(__file__)
    parts = {kind: here.with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")}
    parts["js"] += "\n" + here.with_name("report_viewer.js").read_text(encoding="utf-8")
    return parts


def policy(style: str, script: str) -> str:
    """Nothing may be loaded or run but this very style and this very script."""

    def allowed(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {allowed(script)}; style-src {allowed(style)}; "
        "base-uri 'none'; form-action 'none'"
    )


def write_page(out: Path, data: dict, spool) -> int:
    """Write the page with the chunks in `spool`; returns its size in bytes. `data["bytes"]` is filled in here."""
    parts = template()
    parts["data"] = as_json(data | {"bytes": None})
    fill = {
        "policy": policy(parts["css"], parts["js"]),
        "title": data["title"].replace("&", "&amp;").replace("<", "&lt;"),
        "style": parts["css"],
        "script": parts["js"],
        "data": parts["data"],
    }
    # one pass, so that nothing which is filled in is looked at again
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: fill.get(match[1], match[0]), parts["html"])
    head, tail = page.rsplit("{{chunks}}", 1)
    chunks = spool.seek(0, os.SEEK_END)
    width = 12
    size = len(head.encode()) + chunks + len(tail.encode()) + width - len("null")
    before, after = head.split('"bytes":null', 1)
    half = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with open(half, "wb") as stream:
            stream.write(f'{before}"bytes":{size:{width}d}{after}'.encode())
            spool.seek(0)
            while block := spool.read(1 << 20):
                stream.write(block)
            stream.write(tail.encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(half, out)
    finally:
        half.unlink(missing_ok=True)
    return size


# ---------------------------------------------------------------- the numbers


def describe_runs(runs: list[metrics.Run]) -> dict:
    """All that the page shows but the trajectories. `arm` of a run is a place in `arms`."""
    arms = list(dict.fromkeys(metrics.arm_names(runs)))
    arm_of = [arms.index(name) for name in metrics.arm_names(runs)]
    described = [describe_run(found, arm, name) for found, arm, name in zip(runs, arm_of, page_names(runs))]
    pairs, notes = comparisons(
        arms, [[found for found, mine in zip(runs, arm_of) if mine == arm] for arm in range(len(arms))]
    )
    return {
        "title": title(arms, described),
        "lead": lead(arms, described),
        "arms": arms,
        "runs": described,
        "means": [means([one for one in described if one["arm"] == arm]) for arm in range(len(arms))],
        "pairs": pairs,
        "pair_notes": notes,
        "modes": failure_modes(),
    }


def page_names(runs: list[metrics.Run]) -> list[str]:
    """The names of the directories; where two are alike, their paths."""
    names = [found.name for found in runs]
    return [name if names.count(name) == 1 else str(found.home) for found, name in zip(runs, names)]


def describe_run(found: metrics.Run, arm: int, name: str) -> dict:
    iterations, spent = [], dict.fromkeys(SPENT, 0)
    priced = any(part and part["cost"] and part["cost"]["dollars"] is not None for part in found.iterations.values())
    for number, part in found.iterations.items():
        cost = None if part is None else making(part["cost"], priced)
        for kind in spent:  # what is not known of one iteration is not known of those that build on it
            known = cost is not None and cost[kind] is not None and spent[kind] is not None
            spent[kind] = spent[kind] + cost[kind] if known else None
        iterations.append(
            {"number": number, "missing": part is None, **(part or {}), "cost": cost, "spent": dict(spent)}
        )
    scores = [part["eval"] for part in found.iterations.values() if part and part["eval"]]
    return {
        "name": name,
        "arm": arm,
        "seed": found.seed,
        "settings": {key: value for key, value in {**found.settings, "seed": found.seed}.items() if value is not None},
        "tasks": f"{scores[0]['on']} ({scores[0]['tasks']} task{'s' * (scores[0]['tasks'] != 1)})" if scores else None,
        "iterations": iterations,
        "chosen": found.best,
        "tests": [
            {"iteration": number, "chosen": number == found.best, "tasks": score["on"], "score": score}
            for number, score in found.test.items()
        ],
        "teacher": found.teacher,
        "missing": missing(found),
    }


def making(cost: dict | None, priced: bool) -> dict:
    """What making an iteration's student took, its evaluation apart: tokens of both policies, minutes, dollars."""
    if cost is None:
        return dict.fromkeys(SPENT)
    parts = [cost[who][kind] for who in ("teacher", "student") for kind in ("in", "out")]
    seconds = [cost["seconds"][stage] for stage in ("collect", "grades", "labels", "train")]
    nothing = not any(seconds)  # the untrained student
    tokens = sum(part or 0 for part in parts) if nothing or None not in parts[:2] or None not in parts[2:] else None
    return {
        "tokens": tokens,
        "minutes": sum(part or 0 for part in seconds) / 60,
        "dollars": 0.0 if priced and nothing else cost["dollars"],
    }


def missing(found: metrics.Run) -> list[str]:
    """What a run has not got yet, in sentences."""
    told = []
    for number, part in found.iterations.items():
        if part is None:
            told.append(f"Iteration {number} is missing.")
            continue
        names = {"collect": "collect", "labels": "relabel", "train": "train", "eval": "evaluate"}
        waiting = [name for key, name in names.items() if part[key] is None and (number > 0 or key == "eval")]
        if waiting:
            told.append(f"Iteration {number} is not finished; not there yet: {', '.join(waiting)}.")
    if found.best is not None and found.best not in found.test:
        told.append(f"The chosen student, of iteration {found.best}, is not scored on test tasks yet.")
    return told


def means(runs: list[dict]) -> dict:
    """The mean over an arm's seeds: of each iteration, and of the chosen students on the test tasks."""
    parts: dict[int, list[dict]] = {}
    for one in runs:
        for part in one["iterations"]:
            if part.get("eval") and part["eval"]["rate"] is not None:
                parts.setdefault(part["number"], []).append(part)
    tests = [
        test["score"]["rate"]
        for one in runs
        for test in one["tests"]
        if test["chosen"] and test["score"]["rate"] is not None
    ]
    iterations = [
        {
            "number": number,
            "rate": statistics.fmean(part["eval"]["rate"] for part in found),
            "seeds": len(found),
            "spent": {kind: mean_if_known([part["spent"][kind] for part in found]) for kind in SPENT},
        }
        for number, found in sorted(parts.items())
    ]
    return {"iterations": iterations, "test": {"rate": statistics.fmean(tests), "seeds": len(tests)} if tests else None}


def mean_if_known(values: list[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def comparisons(arms: list[str], runs: list[list[metrics.Run]]) -> tuple[list[dict], list[str]]:
    """Every other arm against the first: a row a seed, and the seeds together with both their intervals."""
    rows, told = [], []
    for other, theirs in zip(arms[1:], runs[1:]):
        try:
            found = metrics.compare(runs[0], theirs)
        except InputError as error:  # no task has a result on both sides
            told.append(f"{other} and {arms[0]} are not compared task by task: {error}.")
            continue
        if found is None:
            told.append(f"{other} and {arms[0]} have no seed in common in which both were evaluated.")
            continue
        for seed, one in found["seeds"].items():
            head = {"name": f"{other} against {arms[0]}, seed {seed}", "tasks": found["on"], "n": one["tasks"]}
            rows.append(head | {key: one[key] for key in ("only_a", "only_b", "difference", "low", "high", "p")})
        whole = found["together"]
        if whole["seeds"] > 1:
            both = {"tasks": found["on"], "n": whole["tasks"], "difference": whole["difference"], "p": None}
            rows.append(both | {"name": f"{whole['seeds']} seeds together (bootstrap over seeds and tasks)",
                                "low": whole["low"], "high": whole["high"]})  # fmt: skip
            rows.append(both | {"name": f"{whole['seeds']} seeds together (t over the seeds)",
                                "low": whole["t_low"], "high": whole["t_high"]})  # fmt: skip
        told += [f"{other}: {note}." for note in metrics.notes(found)]
    if rows:
        told.append(
            "Each run at its chosen iteration, on the same tasks. A seed's row: Newcombe's interval for paired "
            "proportions, and McNemar's exact test; both are about other tasks of this kind, not about other seeds. "
            "Claim what the bootstrap and the t interval both say."
        )
    return rows, told


def failure_modes() -> list[tuple[str, str]]:
    """Name and definition of each, in their order; the definitions are those of common/failures.py."""
    texts = {}
    for names, text in re.findall(r"^\* ([\w, ]+): (.+(?:\n  .+)*)", failures.__doc__, re.M):
        texts |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return [(name, texts[name]) for name in metrics.FAILURE_MODES]


def title(arms: list[str], runs: list[dict]) -> str:
    if len(runs) == 1:
        collected = any(part.get("collect") for part in runs[0]["iterations"])
        return f"{runs[0]['name']}: {arms[0] if collected else 'before any training'}"
    if len(arms) > 3:
        return f"{len(arms)} arms compared"
    return f"{' and '.join(arms)}, compared" if len(arms) > 1 else f"{arms[0]}, {len(runs)} runs"


def lead(arms: list[str], runs: list[dict]) -> str:
    settings, tasks = runs[0]["settings"], runs[0]["tasks"]
    teacher = f"the teacher {settings['teacher']}" if "teacher" in settings else "a teacher"
    who = f"{settings.get('student', 'A student')} learns to repair software from {teacher}"
    how = f"{', '.join(arms)}; {len(runs)} runs" if len(runs) > 1 else f"seed {runs[0]['seed']}"
    return f"{who} ({how}): what it resolves{f' of {tasks}' if tasks else ''} after each iteration, and why not more."


# ---------------------------------------------------------------- the command


def report(homes: list[Path], out: Path) -> dict:
    """Write the page of these runs to `out`, and where that is a run's own place the summaries of its iterations with it.
    Returns the summary of the page."""
    own = out.parent.resolve() == homes[0].resolve() and len(homes) == 1
    runs = [metrics.write_summaries(home) if own else metrics.read(home) for home in homes]
    if len(runs) > 1:
        metrics.check_comparable(runs)
    data = describe_runs(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent) as spool:
        collection = Collection(spool)
        for number, home in enumerate(homes):
            collection.add_run(number, home)
        data |= collection.finish()
        data |= {
            "raw": collection.raw,
            "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "command": "python -m common.report",
        }
        size = write_page(out, data, spool)
    print(f"{out}: {size / 1e6:.1f} MB, from {collection.raw / 1e6:.1f} MB of trajectories and labels")
    return {"runs": len(runs), "trajectories": len(collection.rows), "bytes": size}


def _main() -> None:
    homes = metrics.homes_from(sys.argv)

    def work(args: Args) -> None:
        metrics.check_homes(homes, "python -m common.report")
        if len(homes) > 1 and args.out is None:
            raise InputError("several runs: --out FILE says where their page goes")
        run.print_summary(report(homes, Path(args.out or homes[0] / "report.html")))

    run.main(Args, work, "python -m common.report RUN [RUN...] [--out FILE]")


if __name__ == "__main__":
    _main()
