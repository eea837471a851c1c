"""Files that can be stopped and gone on with, and errors that name file and line."""

import json

import pytest

from common import jsonl, schema
from common.errors import InputError


def label(turn, trajectory="t"):
    return {
        "schema": schema.VERSION, "trajectory_id": trajectory, "instance_id": "x", "iteration": 1, "turn": turn,
        "label": "ok", "valid": True, "reason": None, "source": "queried", "teacher": {}, "tokens": {}, "seconds": 0.1,
        "agrees": None,
    }  # fmt: skip


def output(path):
    return jsonl.Output(path, "label", key=lambda r: (r["trajectory_id"], r["turn"]))


def test_finished_file_is_in_the_order_of_the_work(tmp_path):
    out = output(tmp_path / "labels.jsonl")
    out.open()
    for turn in (2, 0, 1):
        out.append(label(turn))
    assert not out.finished
    out.finish([("t", 0), ("t", 1), ("t", 2)])
    assert out.finished and not out.part.exists()
    assert [r["turn"] for r in jsonl.read(out.path, "label")] == [0, 1, 2]


def test_torn_last_line_is_dropped_and_redone(tmp_path, capsys):
    out = output(tmp_path / "labels.jsonl")
    out.open()
    out.append(label(0))
    out.append(label(1))
    out.close()
    whole = out.part.read_bytes()
    out.part.write_bytes(whole[:-7])  # as a kill leaves it

    again = output(out.path)
    again.open()
    assert ("t", 0) in again and ("t", 1) not in again
    assert "torn" in capsys.readouterr().err
    again.append(label(1))
    again.finish([("t", 0), ("t", 1)])
    assert out.path.read_bytes() == whole


def test_two_writers_are_refused(tmp_path):
    first = output(tmp_path / "labels.jsonl")
    first.open()
    with pytest.raises(InputError, match="another process"):
        output(tmp_path / "labels.jsonl").open()


def test_a_record_is_validated_before_it_is_written(tmp_path):
    out = output(tmp_path / "labels.jsonl")
    out.open()
    with pytest.raises(InputError, match="'turn' must be int"):
        out.append(label("2"))
    assert out.part.read_bytes() == b""


def test_a_kill_between_the_file_and_its_manifest_costs_nothing(tmp_path):
    """FILE was whole, but the manifest did not say so yet: the records are taken up, and not made again."""
    out = output(tmp_path / "labels.jsonl")
    out.open()
    out.append(label(0))
    out.finish([("t", 0)])
    assert out.path.exists() and not out.part.exists()
    again = output(tmp_path / "labels.jsonl")
    again.open(resumed=True)
    assert ("t", 0) in again and not again.path.exists()
    again.finish([("t", 0)])
    anew = output(tmp_path / "labels.jsonl")  # no manifest speaks of it: it is somebody's, and is not taken for ours
    anew.open()
    assert ("t", 0) not in anew and anew.path.exists()


def test_overwriting_stops_where_another_process_writes(tmp_path):
    first, second = output(tmp_path / "labels.jsonl"), output(tmp_path / "labels.jsonl")
    first.open()
    first.append(label(0))
    with pytest.raises(InputError, match="another process is writing this file"):
        second.remove()
    first.finish([("t", 0)])
    (tmp_path / "labels.jsonl.infra.jsonl").write_text("{}\n")
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    out = output(tmp_path / "labels.jsonl")
    out.open()
    out.append(label(0))
    real, calls = out.stream, []

    class Full:
        """Takes ten bytes, then refuses, as a full disk does."""

        def write(self, data):
            if calls:
                raise OSError(28, "No space left on device")
            calls.append(1)
            return real.write(data[:10])

        def __getattr__(self, name):
            return getattr(real, name)

    out.stream = Full()
    with pytest.raises(OSError, match="No space"):
        out.append(label(1))
    out.stream = real
    out.append(label(2))
    assert [json.loads(line)["turn"] for line in out.part.read_text().splitlines()] == [0, 2]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json", ":2: not a JSON object"),
        ("[1]", ":2: not a JSON object"),
        (json.dumps(label(0) | {"schema": 99}), ":2: label has schema version 99"),
        (json.dumps({k: v for k, v in label(0).items() if k != "valid"}), ":2: label: field 'valid' is missing"),
        (json.dumps(label(0) | {"valid": 1}), ":2: label: field 'valid' must be bool"),
        (json.dumps(label(0) | {"turn": True}), ":2: label: field 'turn' must be int"),
        (json.dumps(label(0) | {"source": "student"}), ":2: label source 'student'"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(label(0)) + "\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        list(jsonl.read(path, "label"))
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_damaged_byte_is_named_with_its_own_line(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_bytes((json.dumps(label(0)) + "\n").encode() * 2 + b'{"a": "\xff"}\n')
    with pytest.raises(InputError, match="labels.jsonl:3: not a JSON object"):
        list(jsonl.read(path, "label"))
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match="labels.jsonl:1: not a JSON object"):
        list(jsonl.read(path, "label"))
    for line in ("5", "null", "[" * 100_000):
        (tmp_path / "out.jsonl.part").write_text(line + "\n")
        with pytest.raises(InputError, match="out.jsonl.part:1: not a JSON object; --overwrite"):
            jsonl.Output(tmp_path / "out.jsonl", "label", key=lambda r: (r["turn"],)).open()


def test_how_a_trajectory_was_asked():
    policy, limits = {"sampling": {"temperature": 0.5, "top_p": 1}}, {"max_new_tokens": 5, "max_context": 9}
    good = {"teacher": None, "student": policy, "limits": limits}
    assert schema.asked(good, "t") == {"temperature": 0.5, "top_p": 1, "max_new_tokens": 5, "max_context": 9}
    for bad, words in (({"student": None}, "no sampling"), ({"student": {"model": "m"}}, "no sampling"),
                       ({"student": {"sampling": {"temperature": "high", "top_p": 1}}}, "'temperature' must be int or float"),
                       ({"limits": {}}, "limits: field 'max_new_tokens' is missing")):  # fmt: skip
        with pytest.raises(InputError, match=f"t: .*{words}"):
            schema.asked(good | bad, "t")


def test_turn_numbers_of_a_trajectory_are_checked(tmp_path):
    """Labels are joined to states by turn number: an off-by-one here would train on the wrong state."""
    turn = {"role": "assistant", "content": "x", "turn": 1, "actor": "student", "command": None, "finish_reason": "stop",
            "tokens": {}, "seconds": 0, "logprob": None}  # fmt: skip
    record = {
        "schema": schema.VERSION, "trajectory_id": "t", "instance_id": "x", "base_commit": "c", "iteration": 1, "attempt": 0, "seed": 0,
        "mix": "turn", "beta": 0.5, "student": None, "teacher": None, "prompt": "toy-1", "limits": {},
        "messages": [{"role": "user", "content": "fix"}, turn], "exit_status": "submitted", "patch": "", "started": 0,
        "finished": 1,
    }  # fmt: skip
    with pytest.raises(InputError, match=r"messages\[1\]: turn is 1, but this is assistant turn 0"):
        schema.check(record, "trajectory", "f:1")
    turn["turn"] = 0
    schema.check(record, "trajectory", "f:1")
    turn["actor"] = "oracle"
    with pytest.raises(InputError, match="actor 'oracle'"):
        schema.check(record, "trajectory", "f:1")


def test_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="nothing.jsonl: No such file"):
        list(jsonl.read(tmp_path / "nothing.jsonl"))
