"""The command line, exit codes, manifests and what counts as the same work."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import jsonl, run
from common.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("01_collect.py", "02_relabel.py", "03_train.py", "04_eval.py")


@dataclass
class Args:
    out: str
    """where to"""
    beta: float | None = None
    """share of the teacher, 100 % by default"""
    data: list[str] | None = None
    """files"""
    show: bool = False
    """print"""
    workers: int = 3
    """threads"""


def test_flags_come_from_the_fields():
    args = run.parse(Args, ["--out", "x", "--beta", "0.5", "--data", "a", "b", "--show"])
    assert args == Args("x", 0.5, ["a", "b"], True, 3)
    assert run.parse(Args, ["--out", "x", "--data", "a", "b", "--data", "c"]).data == ["a", "b", "c"]
    assert run.parse(Args, ["--out", "x", "--data", "d"]).data == ["d"]  # nothing stays from one call to the next


def test_help_shows_the_text_under_a_field(capsys):
    with pytest.raises(SystemExit) as left:
        run.parse(Args, ["--help"])
    assert left.value.code == 0
    assert "share of the teacher, 100 % by default" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("argv", [[], ["--out"], ["--out", "x", "--beta", "high"], ["--out", "x", "--other", "1"]])
def test_bad_usage_is_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        run.parse(Args, argv)
    assert left.value.code == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once(script):
    """No model library may be loaded for a question about flags. Aim: 0.5 s; the bound allows for a busy machine."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--overwrite" in done.stdout
    assert time.monotonic() - began < 2
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    code += "\nexcept SystemExit: pass\nprint([m for m in ('torch', 'transformers', 'swebench', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("[]"), done.stderr


@pytest.mark.parametrize("lines", [3, 100_000])
def test_a_reader_that_has_read_enough_is_no_error(tmp_path, lines):
    """script | head"""
    script = tmp_path / "script.py"
    script.write_text(f'''
"""prints"""
import time
from dataclasses import dataclass
from common import run

@dataclass
class Args:
    n: int = {lines}
    """lines"""

def work(args):
    time.sleep(0.5)
    for number in range(args.n):
        print(number)

run.main(Args, work)''')
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
                               env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
    process.stderr.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_ends_with_its_loop(tmp_path, number):
    """Somebody ends run_loop.sh alone. Its servers' keeper is the shell that runs the stage."""
    script = tmp_path / "script.py"
    script.write_text("""
import time
from dataclasses import dataclass
from common import run

@dataclass
class Args:
    n: int = 0

def work(args):
    print("begun", flush=True)
    time.sleep(60)

run.main(Args, work)""")
    loop = subprocess.Popen(["bash", "-c", f"export SWE_DAGGER_KEEPER=$$; {sys.executable} {script}; :"], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert loop.stdout.readline() == "begun\n"
    loop.send_signal(number)
    began = time.monotonic()
    _, said = loop.communicate()  # returns when the stage has closed its ends of the pipes, too
    assert "stopped; the same command goes on from here" in said and time.monotonic() - began < 30


def test_same_work_goes_on_and_other_work_is_refused(tmp_path):
    out = str(tmp_path / "deep" / "t.jsonl")
    args = Args(out)
    same = {"tasks": "abc", "student": {"model": "hf:x", "sampling": {"temperature": 0.7}}}
    stage = run.Stage(out, args, same)
    assert not stage.done
    assert not run.Stage(out, args, same).done
    other = {"tasks": "abc", "student": {"model": "hf:x", "sampling": {"temperature": 0.0}}}
    with pytest.raises(InputError, match="student.sampling.temperature = 0.7, now it is 0.0.*--overwrite"):
        run.Stage(out, args, other)
    stage.finish({"turns": 3, "share": 1 / 3})
    again = run.Stage(out, args, same)
    assert again.done and again.manifest["summary"]["turns"] == 3
    with pytest.raises(InputError, match="another --out"):  # also when it is finished
        run.Stage(out, args, other)
    assert not run.Stage(out, args, other, overwrite=True).done


def test_a_refused_overwrite_leaves_the_manifest_as_it_was(tmp_path):
    """Another process is writing the records: what it makes must not be described by our settings."""
    out, args = str(tmp_path / "t.jsonl"), Args(str(tmp_path / "t.jsonl"))
    theirs, ours = (jsonl.Output(out, "label", key=lambda record: ()) for _ in range(2))
    run.Stage(out, args, {"teacher": "a"}, outputs=(theirs,))
    theirs.open()
    with pytest.raises(InputError, match="another process is writing this file"):
        run.Stage(out, args, {"teacher": "b"}, overwrite=True, outputs=(ours,))
    theirs.finish([])
    assert run.Stage(out, args, {"teacher": "a"}, outputs=(theirs,)).manifest["same"] == {"teacher": "a"}
    assert run.Stage(out, args, {"teacher": "b"}, overwrite=True, outputs=(ours,)).manifest["same"] == {"teacher": "b"}
    assert not Path(out).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_read_is_not_written(tmp_path, overwrite):
    (tmp_path / "t.jsonl").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path)
    for data, out in (("t.jsonl", "t.jsonl"), ("t.jsonl:2", "t.jsonl"), ("t.jsonl", "link/t.jsonl")):
        args = Args(str(tmp_path / out), data=["toy:dev", str(tmp_path / data)])
        with pytest.raises(InputError, match="--data .*t.jsonl.* is .*t.jsonl, which this would write: give another --out"):
            run.Stage(args.out, args, {}, overwrite=overwrite, outputs=(jsonl.Output(args.out, "label", key=lambda r: ()),))
    assert [path.name for path in tmp_path.iterdir()] in (["t.jsonl", "link"], ["link", "t.jsonl"])
    with pytest.raises(InputError, match="--out is empty"):
        run.Stage("", Args(""), {})


def test_a_diff_that_is_not_utf8_is_noted_all_the_same(tmp_path, monkeypatch):
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    subprocess.run(["git", "-C", tmp_path, "add", "a.txt"], check=True)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert "+caf\ufffd" in run._git("diff", "HEAD")


def test_a_damaged_manifest_is_named(tmp_path):
    out = str(tmp_path / "t.jsonl")
    for text in ("", "[]", '{"same": ', '{"same": 5}', "[" * 100_000):
        Path(f"{out}.manifest.json").write_text(text)
        with pytest.raises(InputError, match="t.jsonl.manifest.json: damaged, no JSON object; run its stage again with --overwrite"):
            run.Stage(out, Args(out), {})


def test_seconds_are_those_of_all_calls(tmp_path, monkeypatch):
    """A call that was killed has noted its time; one that goes on adds to it."""
    now = [1000.0]
    monkeypatch.setattr(run.time, "time", lambda: now[0])
    stage = run.Stage(str(tmp_path / "t.jsonl"), Args("x"), {})
    for second in (1010.0, 1100.0, 1105.0):  # the last one is too soon after the one before, and goes unnoted
        now[0] = second
        stage.note_time()
    now[0] = 5000.0
    again = run.Stage(str(tmp_path / "t.jsonl"), Args("x"), {})
    now[0] = 5007.0
    again.finish({})
    assert json.loads(again.manifest_path.read_text())["seconds"] == 107.0


def test_manifest_says_how_it_was_made(tmp_path):
    stage = run.Stage(str(tmp_path / "t.jsonl"), Args("x"), {"seed": 1})
    content = json.loads(stage.manifest_path.read_text())
    assert content["settings"]["workers"] == 3 and content["same"] == {"seed": 1}
    assert {"command", "commit", "diff", "packages", "started"} <= content.keys()


def test_summary_line(capsys):
    run.print_summary({"labels": 3, "loss": 0.123456789, "agree": None, "table": {"a": 1}})
    assert capsys.readouterr().out == "summary labels=3 loss=0.1234568 agree=None\n"


def test_an_adapter_may_lie_elsewhere_but_not_be_another(tmp_path, monkeypatch):
    """A run directory that was moved or copied goes on: the adapter's hash says which it is, not its path."""
    args = Args(out=str(tmp_path / "o"))

    def stage(adapter, adapter_hash):
        return run.Stage(str(tmp_path / "o"), args, {"student": {"adapter": adapter, "adapter_hash": adapter_hash}})

    stage("runs/a/adapter", "h1")
    stage("elsewhere/adapter", "h1")
    with pytest.raises(InputError, match="student.adapter_hash = 'h1', now it is 'h2'"):
        stage("runs/a/adapter", "h2")
    with pytest.raises(InputError, match="student.adapter = 'elsewhere/adapter', now it is None"):
        stage(None, None)


def test_numbers_that_json_does_not_have():
    nan = float("nan")
    assert run.finite({"loss": nan, "a": [1.5, -nan, float("inf")], "b": "NaN"}) == {"loss": None, "a": [1.5, None, None], "b": "NaN"}
