"""What 03_train.py trains on: the valid labels of iteration directories, as tokens at the states where they were given."""

import json
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

from common import chat, jsonl, models, prefix_tree, stage_tools
from common.errors import InputError


@dataclass
class Labelled:
    """One trajectory that is trained on: its samples, and what is known of it besides."""

    samples: prefix_tree.Trajectory
    instance_id: str
    iteration: int
    student: dict | None  # who collected it, as recorded
    student_turns: array  # by turn: the turns of the student before it
    directory: str

    @classmethod
    def of(cls, record: dict, samples: prefix_tree.Trajectory, directory: str) -> "Labelled":
        before, student_turns = 0, array("H")
        for message in record["messages"]:
            if message["role"] == "assistant":
                student_turns.append(before)
                before += message["actor"] == "student"
        return cls(samples, record["instance_id"], record["iteration"], record["student"], student_turns, directory)


def read_labels(directories: list[str]) -> tuple[list[dict[str, dict[int, str]]], dict]:
    """(for each directory {trajectory_id: {turn: text of a valid label}}, the chat template arguments).

    The student acted with these arguments, so training renders with them. Raises InputError where a label names a
    trajectory or a turn that is not there, where no label is valid, and where students acted with different arguments.
    """
    found, invalid, kinds = [], 0, set()
    for directory in directories:
        turns: dict[str, int] = {}
        for number, record in enumerate(jsonl.read(Path(directory) / "trajectories.jsonl", "trajectory"), start=1):
            if record["trajectory_id"] in turns:
                raise InputError(f"{directory}/trajectories.jsonl:{number}: {record['trajectory_id']} is there twice")
            turns[record["trajectory_id"]] = sum(m["role"] == "assistant" for m in record["messages"])
            if record["student"]:
                kwargs = (record["student"].get("extra") or {}).get("chat_template_kwargs") or {}
                kinds.add(json.dumps(kwargs, sort_keys=True))
        labels: dict[str, dict[int, str]] = {name: {} for name in turns}
        path = Path(directory) / "labels.jsonl"
        for number, label in enumerate(jsonl.read(path, "label"), start=1):
            name, turn = label["trajectory_id"], label["turn"]
            where = f"{path}:{number}: label of {name}, turn {turn}"
            if name not in turns:
                raise InputError(f"{where}: {directory}/trajectories.jsonl has no such trajectory; these two files do "
                                 "not belong together: run 02_relabel.py on this trajectories.jsonl")
            if turn >= turns[name]:
                raise InputError(f"{where}: the trajectory has {turns[name]} turns, counted from 0; run 02_relabel.py "
                                 "on this trajectories.jsonl")
            if turn in labels[name]:
                raise InputError(f"{where}: this state is labelled twice; run 02_relabel.py --overwrite")
            labels[name][turn] = label["label"] if label["valid"] else None
            invalid += not label["valid"]
        valid = {name: {t: text for t, text in of.items() if text is not None} for name, of in labels.items()}
        found.append({name: of for name, of in valid.items() if of})
    if not any(found):
        raise InputError(f"no valid label in {' '.join(directories)} ({invalid} invalid ones): nothing to train on")
    if len(kinds) > 1:
        raise InputError(f"students acted with different chat template arguments: {' and '.join(sorted(kinds))}; train "
                         "on data of one kind")
    return found, json.loads(kinds.pop()) if kinds else {}


def tokenise(record: dict, labels: dict[int, str], tokenizer, kwargs: dict, max_context: int) -> tuple:
    """(the samples of one trajectory, labels left out): each label at its state, the messages before that turn."""
    places = {m["turn"]: i for i, m in enumerate(record["messages"]) if m["role"] == "assistant"}
    states = [(places[turn], text) for turn, text in sorted(labels.items())]
    made, too_long = prefix_tree.Trajectory(record["trajectory_id"]), 0
    for turn, (ids, n_prompt) in zip(sorted(labels), chat.samples(tokenizer, record["messages"], states, kwargs)):
        if len(ids) > max_context:
            too_long += 1
        else:
            made.add(turn, ids, n_prompt)
    return made.close(), too_long


def prepare(directories: list[str], keep: str, model: str, max_context: int, say: bool) -> tuple[list[Labelled], int]:
    """(the trajectories that have samples, labels left out for their length); prints one sample.

    keep: resolved, or all trajectories. say: whether this process shows its progress. Raises InputError as `read_labels`
    and stage_tools.resolved do, and where nothing is left to train on.
    """
    from tqdm import tqdm

    labels, kwargs = read_labels(directories)
    if keep == "resolved":
        kept = [stage_tools.resolved(Path(directory) / "trajectories.jsonl", of) if of else set()
                for directory, of in zip(directories, labels)]
        labels = [{name: of[name] for name in of if name in ids} for of, ids in zip(labels, kept)]
        if not any(labels):
            raise InputError(f"no trajectory of {' '.join(directories)} resolved its task: nothing to train on")
    tokenizer, _ = models.load_tokenizer(model)
    data, n_labels, too_long = [], 0, 0
    bar = tqdm(total=sum(map(len, labels)), unit="trajectory", desc="tokenise", dynamic_ncols=True, leave=False,
               disable=not say)
    for directory, of in zip(directories, labels):
        for record in jsonl.read(Path(directory) / "trajectories.jsonl"):
            if record["trajectory_id"] not in of:
                continue
            made, dropped = tokenise(record, of.pop(record["trajectory_id"]), tokenizer, kwargs, max_context)
            too_long += dropped
            if made:
                data.append(Labelled.of(record, made, directory))
            n_labels += len(made)
            bar.update()
            bar.set_postfix(labels=n_labels, too_long=too_long)
    bar.close()
    if not data:
        raise InputError(f"every label is longer than --max-context {max_context}: nothing to train on")
    if too_long and say:
        print(f"{too_long} labels are longer than --max-context {max_context} and left out", file=sys.stderr)
    if say:
        example = data[0].samples.samples()[-1]
        chat.show(tokenizer, example.ids.tolist(), example.n_prompt)
    return data, too_long
