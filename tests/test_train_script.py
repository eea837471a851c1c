"""03_train.py as it is used: trained, stopped, gone on with, by several processes, on NF4, and with bad input."""

import contextlib
import importlib
import io
import json
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from common import models, run, training
from common.errors import InputError, StageError
from tests import tiny
from tests.records import iteration, label, tokenised, trajectory, write

ROOT = Path(__file__).resolve().parent.parent
train = importlib.import_module("03_train")


def script(*args):
    """03_train.py inside this process, where torch is loaded already: (last line of stdout, stderr). Errors come out."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        train.work(run.parse(train.Args, [str(arg) for arg in args]))
    return out.getvalue().strip().splitlines()[-1], err.getvalue()


def summary(done):
    assert done[0].startswith("summary ")
    return dict(word.split("=", 1) for word in done[0].split()[1:])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("train")
    iteration(home / "iter_001")
    tiny.model_dir(home, "llama", "chatml")
    (home / "tiny-llama-chatml-2x64-0").rename(home / "base")
    return home


def test_train_then_load_then_go_on(home):
    """The adapter is a plain PEFT one; training lowers the loss; both packings end in the same weights."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    data, base, out = home / "iter_001", home / "base", home / "tree"
    common = ("--data", data, "--model", base, "--epochs", 6, "--lr", "5e-3", "--batch-size", 2)
    done = script(*common, "--out", out)
    found = summary(done)
    assert found["labels"] == "18" and found["steps"] == "18"
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 19))
    assert {"step", "epoch", "loss", "lr", "grad_norm", "label_tokens", "rows", "seconds"} <= log[0].keys()
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    last = [line for line in log if line["epoch"] == 6]
    mean = sum(line["loss"] * line["label_tokens"] for line in last) / sum(line["label_tokens"] for line in last)
    assert float(found["loss"]) == pytest.approx(mean, rel=1e-6)
    assert int(found["tokens_computed"]) == sum(line["rows"] for line in log)
    assert ">>>" in done[1]  # the example that is printed first
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert json.loads((out / "manifest.json").read_text())["summary"]["labels"] == 18
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "label_nll.jsonl", "log", "manifest.json",
        "training_log.jsonl"]
    assert not list(home.glob("*.tmp"))

    per_turn = script(*common, "--out", home / "per-turn", "--packing", "per-turn")
    assert float(summary(per_turn)["loss"]) == pytest.approx(float(found["loss"]), rel=1e-3)
    assert summary(per_turn)["tokens_distinct"] == found["tokens_distinct"]
    assert int(summary(per_turn)["tokens_computed"]) > 1.5 * int(found["tokens_computed"])
    a, b = (load_file(home / name / "adapter_model.safetensors") for name in ("tree", "per-turn"))
    distance = sum((a[key] - b[key]).square().sum() for key in a).sqrt()
    assert distance < 1e-2 * sum(a[key].square().sum() for key in a).sqrt()

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    (samples, *_), _ = tokenised([str(data)], models.load_tokenizer(str(base))[0])
    tuned = reference_loss(loaded, samples)
    with loaded.disable_adapter():
        assert tuned < 0.7 * reference_loss(loaded, samples)

    again = script(*common, "--out", out)  # finished: says so, prints the same summary, touches nothing
    assert "finished" in again[1] and summary(again) == found

    dry = script("--data", data, "--model", base, "--init-adapter", out, "--dry-run", "--out", home / "dry")
    assert not (home / "dry").exists() and summary(dry)["steps"] == "0"
    assert float(summary(dry)["loss"]) < 0.7 * log[0]["loss"]  # it starts where the first ended
    on = script("--data", data, "--model", base, "--init-adapter", out, "--out", home / "on", "--max-steps", 1)
    assert summary(on)["steps"] == "1"


def reference_loss(model, samples):
    total = 0.0
    for s in samples:
        logits = model(input_ids=torch.tensor(s.ids[None, :], dtype=torch.long)).logits[0, s.n_prompt - 1 : -1]
        targets = torch.tensor(s.ids[s.n_prompt :], dtype=torch.long)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    return total


def test_same_seed_same_adapter(home):
    common = ("--data", home / "iter_001", "--model", home / "base", "--max-steps", 2)
    for name in ("a", "b"):
        script(*common, "--out", home / name)
    script(*common, "--out", home / "c", "--seed", 1)
    read = lambda name: (home / name / "adapter_model.safetensors").read_bytes()  # noqa: E731
    assert read("a") == read("b") != read("c")
    assert (home / "a" / "adapter_config.json").read_text() == (home / "b" / "adapter_config.json").read_text()


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_adapter(home, tmp_path):
    """Stopped in the middle; the end is that of a run that was left alone, log included."""
    common = ("--data", home / "iter_001", "--model", home / "base", "--epochs", 15, "--save-every", 0)
    for out, stops in ((tmp_path / "whole", ()), (tmp_path / "stopped", (signal.SIGTERM, signal.SIGKILL))):
        log = out / "training_log.jsonl"
        for number, stop in enumerate(stops, start=1):
            command = [sys.executable, ROOT / "03_train.py", *map(str, common), "--out", out]
            running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while running.poll() is None and (not log.exists() or log.read_text().count("\n") < 8 * number):
                time.sleep(0.01)
            running.send_signal(stop)
            assert running.wait() == (1 if stop == signal.SIGTERM else -stop)
            steps = torch.load(out / "state.pt", weights_only=True)["count"]["steps"]
            assert 8 * number - 1 <= steps < 30 and not (out / "adapter_config.json").exists()
        found = summary(script(*common, "--out", out))
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 31)) and found["steps"] == "30"
        assert not (out / "state.pt").exists()
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert a == b


@pytest.mark.slow
@pytest.mark.parametrize("packing, quant", [("tree", "none"), ("per-turn", "none"), ("tree", "nf4")])
def test_two_processes_train_as_one(home, tmp_path, packing, quant):
    """Two gloo processes under torchrun share the rows of every step; the adapter is that of one to rounding."""
    from safetensors.torch import load_file

    common = ("--data", home / "iter_001", "--model", home / "base", "--epochs", 2, "--packing", packing,
              "--quant", quant)  # fmt: skip
    one = summary(script(*common, "--out", tmp_path / "one"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, ROOT / "03_train.py", *map(str, common), "--out", tmp_path / "two"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = summary([done.stdout])
    assert two["processes"] == "2" and float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-5)
    assert two["steps"] == one["steps"] and done.stdout.count("\n") == 1
    for name in ("loss_nf4", "loss_plain") if quant == "nf4" else ():
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-4)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    distance = sum((a[key] - b[key]).square().sum() for key in a).sqrt()
    assert distance < 1e-3 * sum(a[key].square().sum() for key in a).sqrt()


def test_the_command(home, tmp_path):
    """As a user mistypes it: exit code 2, one clear line, nothing on stdout."""
    command = [sys.executable, ROOT / "03_train.py", "--data", home / "iter_001", "--model", home / "base"]
    done = subprocess.run([*command, "--epochs", "0", "--out", tmp_path / "no"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --epochs 0: must be more than 0\n"


def test_nf4_trains_on_cpu(home):
    done = script("--data", home / "iter_001", "--model", home / "base", "--quant", "nf4", "--epochs", 4, "--lr", "5e-3",
                  "--out", home / "nf4")  # fmt: skip
    log = [json.loads(line) for line in (home / "nf4" / "training_log.jsonl").read_text().splitlines()]
    assert summary(done)["quant"] == "nf4"
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert (home / "nf4" / "adapter_model.safetensors").exists()


def test_what_the_change_of_base_costs(home, tmp_path, monkeypatch):
    """vLLM serves the plain base under an adapter trained on NF4: both losses, on the same labels, at the end.

    The NF4 model is gone when the plain one is loaded, or an 8B would need room for both.
    """
    loaded, load_base = {}, training.load_base

    def load(model, quant, tree):
        assert all(seen() is None for seen in loaded.values())
        base = load_base(model, quant, tree)
        loaded[quant] = weakref.ref(base)
        return base

    monkeypatch.setattr(training, "load_base", load)
    common = ("--data", home / "iter_001", "--model", home / "base", "--epochs", 2, "--lr", "5e-3")
    done = script(*common, "--quant", "nf4", "--out", tmp_path / "nf4")
    found = summary(done)
    assert list(loaded) == ["nf4", "none"]
    nf4, plain = float(found["loss_nf4"]), float(found["loss_plain"])
    assert 1e-5 * nf4 < abs(nf4 - plain) < 0.2 * nf4
    (samples, *_) = tokenised([str(home / "iter_001")], models.load_tokenizer(str(home / "base"))[0])
    assert int(found["gap_label_tokens"]) == sum(s.n_label for of in samples for s in of)  # six trajectories: all
    assert f"NF4 base: {nf4:.4f}; on the plain base, as vLLM serves it: {plain:.4f}" in done[1]
    assert json.loads((tmp_path / "nf4/manifest.json").read_text())["summary"]["loss_plain"] == pytest.approx(plain)
    for quant, expected in (("none", plain), ("nf4", nf4)):
        dry = script(*common, "--quant", quant, "--init-adapter", tmp_path / "nf4", "--dry-run", "--out", "no")
        assert float(summary(dry)["loss"]) == pytest.approx(expected, rel=1e-5)
        assert "loss_plain" not in summary(dry)
    assert "loss_plain" not in summary(script(*common, "--quant", "none", "--out", tmp_path / "plain"))

    common = (*common, "--measure", 2)
    monkeypatch.setattr(training, "room_for_plain", lambda parameters: parameters < 1000)
    small = script(*common, "--quant", "nf4", "--out", tmp_path / "small")
    assert summary(small)["loss_plain"] == "None" and "plain base, as vLLM serves it: not measured" in small[1]
    assert 0 < int(summary(small)["gap_label_tokens"]) < int(found["gap_label_tokens"])


def test_stopped_while_it_measures(home, tmp_path, monkeypatch):
    """The adapter is on disk before anything is measured, and the same command measures without another step."""
    common = ("--data", home / "iter_001", "--model", home / "base", "--quant", "nf4", "--out", tmp_path / "out")
    whole = summary(script(*common[:-1], tmp_path / "whole"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "plain_loss", stop)
        script(*common)
    adapter = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    assert adapter == (tmp_path / "whole/adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    found = summary(script(*common))
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == adapter
    assert not (tmp_path / "out/state.pt").exists()
    for name in ("loss", "loss_nf4", "loss_plain", "gap_label_tokens", "tokens_computed", "steps"):
        assert found[name] == whole[name]


def test_other_settings_for_the_same_output_are_refused(home):
    common = ("--data", home / "iter_001", "--model", home / "base", "--max-steps", 1, "--out", home / "same")
    script(*common)
    with pytest.raises(InputError, match="lr = 0.001, now it is 0.1.*--overwrite"):
        script(*common, "--lr", "0.1")
    script(*common, "--lr", "0.1", "--overwrite")


def test_two_processes_do_not_train_in_one_directory(home, tmp_path):
    args = ["--data", home / "iter_001", "--model", home / "base", "--max-steps", "1", "--out", tmp_path / "a"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from common import training_files\n"
    code += f"training_files.lock(Path({str(tmp_path / 'a')!r})); print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match="another process is training there"):
            script(*args)
        assert not (tmp_path / "a/manifest.json").exists()
    script(*args)


def test_less_memory_does_not_begin_anew(home, tmp_path, monkeypatch):
    """Out of memory in the second step: said in one line, and the same work goes on with smaller batches."""
    args = ["--data", home / "iter_001", "--model", home / "base", "--max-steps", 3, "--save-every", 0, "--out", tmp_path / "a"]
    real, calls = train.accumulate, []

    def accumulate(*given, **more):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given, **more)

    monkeypatch.setattr(train, "accumulate", accumulate)
    with pytest.raises(StageError, match="out of memory in step 2: lower --tokens-per-batch .it is 2048.*goes on"):
        script(*args, "--batch-size", 1)
    script(*args, "--batch-size", 1, "--tokens-per-batch", 1024, "--checkpointing", "on")
    assert [json.loads(line)["step"] for line in (tmp_path / "a/training_log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_another_rank_than_that_of_the_adapter_is_refused(home, tmp_path):
    args = ["--data", home / "iter_001", "--model", home / "base", "--max-steps", 1]
    script(*args, "--lora-rank", 4, "--lora-alpha", 8, "--out", tmp_path / "a")
    with pytest.raises(InputError, match="has rank 4 and alpha 8, and goes on so: give --lora-rank 4 --lora-alpha 8"):
        script(*args, "--init-adapter", tmp_path / "a", "--out", tmp_path / "b")
    script(*args, "--init-adapter", tmp_path / "a", "--lora-rank", 4, "--lora-alpha", 8, "--out", tmp_path / "b")


def bad(tmp_path, home, *args, labels=None, trajectories=None, model=None):
    one = trajectory()
    write(tmp_path / "data", trajectories or [one], [label(one, 0)] if labels is None else labels)
    with pytest.raises(InputError) as error:
        script("--data", tmp_path / "data", "--model", model or home / "base", "--out", tmp_path / "out", *args)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    return str(error.value)


def test_bad_labels(tmp_path, home):
    one, other = trajectory(), trajectory("toy-9")
    assert "labels.jsonl:2: label of toy-9.i1.a0, turn 1" in bad(tmp_path, home, labels=[label(one, 0), label(other, 1)])
    assert "turn 3: the trajectory has 3 turns" in bad(tmp_path, home, labels=[label(one, 3, "x")])
    assert "labelled twice" in bad(tmp_path, home, labels=[label(one, 0), label(one, 0)])
    assert "no valid label" in bad(tmp_path, home, labels=[label(one, 0, valid=False)])
    assert "no valid label" in bad(tmp_path, home, labels=[])
    assert "labels.jsonl:1" in bad(tmp_path, home, labels=[{"turn": 1}])


def test_bad_settings(tmp_path, home):
    assert "--batch-size 0" in bad(tmp_path, home, "--batch-size", 0)
    assert "--warmup 1.0" in bad(tmp_path, home, "--warmup", 1)
    assert "every label is longer than --max-context 10" in bad(tmp_path, home, "--max-context", 10)
    assert "toy-1.i1.a0, turn 0, has" in bad(tmp_path, home, "--tokens-per-batch", 20)
    assert "nowhere" in bad(tmp_path, home, "--data", tmp_path / "nowhere")
    assert "no adapter there" in bad(tmp_path, home, "--init-adapter", tmp_path / "none")
    assert "no/such/model" in bad(tmp_path, home, model=tmp_path / "no/such/model")


def test_an_adapter_of_another_model_is_refused(tmp_path, home):
    script("--data", home / "iter_001", "--model", home / "base", "--max-steps", 1, "--out", home / "fits")
    other = tiny.model_dir(tmp_path, "llama", "chatml", hidden=32)
    assert "base" in bad(tmp_path, home, "--init-adapter", home / "fits", model=other)
    config = home / "fits" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(home / "base"), other))  # lies about its base: shapes tell
    assert "does not fit" in bad(tmp_path, home, "--init-adapter", home / "fits", model=other)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, home):
    base = tiny.model_dir(tmp_path, "llama", "chatml")
    (Path(base) / "chat_template.jinja").unlink()
    assert "no chat template" in bad(tmp_path, home, model=base)


def test_only_what_resolved_its_task_is_trained_on(tmp_path, home):
    records = [trajectory(f"t-{n}", seed=n) for n in range(4)]
    data = tmp_path / "iter"
    write(data, records, [label(r, turn) for r in records for turn in range(3)])
    common = ("--data", data, "--model", home / "base", "--keep", "resolved", "--dry-run", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="grades/results.jsonl is missing: 04_eval.py --tasks TASKS"):
        script(*common)
    (data / "grades").mkdir()

    def grade(resolved):
        lines = [{"schema": 1, "instance_id": r["instance_id"], "trajectory_id": r["trajectory_id"], "resolved": n in resolved,
                  "tests_status": {}, "exit_status": None, "failure_mode": None, "turns": 3, "tokens": None, "seconds": 1,
                  "tampered": False} for n, r in enumerate(records)]  # fmt: skip
        (data / "grades/results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    grade({1, 3})
    assert summary(script(*common))["labels"] == "6"
    grade({})
    with pytest.raises(InputError, match="no trajectory of .* resolved its task"):
        script(*common)


def test_training_that_diverges_says_so(tmp_path, home):
    with pytest.raises(StageError, match="training diverged; lower --lr"):
        script("--data", home / "iter_001", "--model", home / "base", "--lr", "1e30", "--clip", "1e30", "--warmup", 0,
               "--out", tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_bad_measuring(tmp_path, home):
    assert "--label-nll goes with --dry-run" in bad(tmp_path, home, "--label-nll", tmp_path / "x")
    assert "--measure -1" in bad(tmp_path, home, "--measure", -1)
    assert "--steps-per-epoch 9: there are only 1" in bad(tmp_path, home, "--steps-per-epoch", 9)
