"""The trajectories of common/report.py's page: an index in memory, and all they hold packed chunk by chunk on disk."""

import base64
import contextlib
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from common import jsonl, run, schema
from common.errors import InputError

CHUNK = 2_000_000  # bytes of JSON; the page unpacks this much to show one trajectory
CHUNK_TRAJECTORIES = 64
TITLE = 160  # characters of an issue in the index; a search covers all of it
FAILED_TESTS = 50  # names of failed tests shown with a trajectory
FIELDS = (
    "chunk", "position", "run", "place", "what", "iteration", "instance_id", "trajectory_id", "issue", "turns",
    "student_turns", "teacher_turns", "judged", "differ", "resolved", "failure_mode", "exit_status",
)  # fmt: skip


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
            with contextlib.suppress(InputError):  # it may be another file by now
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
