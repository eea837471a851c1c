"""Training: which labels at which state, the same loss and gradient for both packings, and the script as it is used.

Models are tiny and random, but everything else is real: templates, tokenizers, LoRA, NF4, processes.
"""

import contextlib
import importlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import chat, jsonl, models, prefix_tree, run, training
from common.errors import InputError, StageError
from common.hf_policy import hash_adapter
from common.prefix_tree import Sample
from tests import tiny

train = importlib.import_module("03_train")
ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- data


def trajectory(name="toy-1", attempt=0, turns=3, seed=0, kwargs=None, think=False):
    rng = random.Random(seed)
    words = ["total", "price", "cart", "items", "queue"]
    messages = [{"role": "system", "content": "Fix the bug."}, {"role": "user", "content": f"{name}: wrong total"}]
    for turn in range(turns):
        thought = f"<think>\n{rng.choice(words)}\n</think>\n\n" if think else ""
        said = f"{thought}Look at {rng.choice(words)}.\n```bash\ncat {rng.choice(words)}.py\n```"
        actor = rng.choice(["student", "teacher"])
        messages.append({"role": "assistant", "content": said, "turn": turn, "actor": actor, "command": "cat x",
                         "finish_reason": "stop", "tokens": {}, "seconds": 0.1, "logprob": None})
        messages.append({"role": "user", "content": f"exit 0\n{rng.choice(words)} = {rng.random():.3f}", "exit_code": 0})
    extra = {"chat_template_kwargs": kwargs} if kwargs else {}
    return {"schema": 1, "trajectory_id": f"{name}.i1.a{attempt}", "instance_id": name, "base_commit": "c", "iteration": 1,
            "attempt": attempt, "seed": 0, "mix": "turn", "beta": 0.5, "student": {"extra": extra}, "teacher": {},
            "prompt": "toy-1", "limits": {}, "messages": messages, "exit_status": "turn_limit", "patch": "",
            "started": 0, "finished": 1}  # fmt: skip


def label(of, turn, text=None, valid=True):
    """The teacher's label: what was executed where the teacher acted, something else where the student did."""
    said = [m for m in of["messages"] if m["role"] == "assistant"][turn] if text is None else None
    if said is not None:
        text = said["content"] if said["actor"] == "teacher" else f"Better.\n```bash\nls {turn}\n```"
    return {"schema": 1, "trajectory_id": of["trajectory_id"], "instance_id": of["instance_id"], "iteration": 1,
            "turn": turn, "label": text, "valid": valid, "reason": None if valid else "no command", "source": "queried",
            "teacher": {}, "tokens": {}, "seconds": 0.1, "agrees": None}  # fmt: skip


def write(directory, trajectories, labels):
    directory.mkdir(parents=True, exist_ok=True)
    for name, records in (("trajectories", trajectories), ("labels", labels)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(directory)


def tokenised(directories, tokenizer, max_context=4096):
    """(the samples of each trajectory, labels left out) as 03_train prepares them."""
    labels, kwargs = train.read_labels(directories)
    made = [train.tokenise(record, of[record["trajectory_id"]], tokenizer, kwargs, max_context)
            for directory, of in zip(directories, labels)
            for record in jsonl.read(f"{directory}/trajectories.jsonl") if record["trajectory_id"] in of]
    return [trajectory.samples() for trajectory, _ in made], sum(too_long for _, too_long in made)


def iteration(directory, n=6, turns=3, **options):
    trajectories = [trajectory(f"toy-{i // 2}", i % 2, turns, seed=i, **options) for i in range(n)]
    return write(directory, trajectories, [label(t, turn) for t in trajectories for turn in range(turns)])


def test_labels_stand_at_the_state_before_their_turn(tmp_path):
    """An off-by-one here trains on the observation that the label is supposed to ask for."""
    one = trajectory(turns=3)
    directory = write(tmp_path, [one], [label(one, 2), label(one, 0), label(one, 1, valid=False)])
    tokenizer = tiny.tokenizer("chatml")
    (samples,), too_long = tokenised([directory], tokenizer)
    assert too_long == 0 and [s.name[-2] for s in samples] == ["0", "2"]  # the invalid label is not trained on
    for sample, turn in zip(samples, (0, 2)):
        state = one["messages"][: 2 + 2 * turn]
        assert state[-1]["role"] == "user"
        assert sample.ids[: sample.n_prompt].tolist() == chat.render(tokenizer, state)
        assert tokenizer.decode(sample.ids[sample.n_prompt : -1]) == label(one, turn)["label"]


def test_prompts_are_rendered_as_for_acting(tmp_path):
    directory = iteration(tmp_path / "a", kwargs={"enable_thinking": False})
    assert train.read_labels([directory])[1] == {"enable_thinking": False}
    tokenizer = tiny.tokenizer("qwen3")
    sample = tokenised([directory], tokenizer)[0][0][0]
    assert tokenizer.decode(sample.ids[: sample.n_prompt]).endswith("<think>\n\n</think>\n\n")
    other = iteration(tmp_path / "b", kwargs={"enable_thinking": True})
    with pytest.raises(InputError, match="different chat template arguments"):
        train.read_labels([directory, other])


def test_a_label_beyond_the_context_is_left_out_whole(tmp_path):
    directory = write(tmp_path, [t := trajectory(turns=3)], [label(t, turn) for turn in range(3)])
    tokenizer = tiny.tokenizer("chatml")
    (whole,), _ = tokenised([directory], tokenizer)
    (kept,), too_long = tokenised([directory], tokenizer, len(whole[1].ids))
    assert too_long == 1
    assert [s.ids.tolist() for s in kept] == [s.ids.tolist() for s in whole[:2]]


def test_steps_depend_on_the_seed_alone():
    steps = train.plan(10, 4, 2, None, seed=3)
    assert steps == train.plan(10, 4, 2, None, seed=3) != train.plan(10, 4, 2, None, seed=4)
    assert [epoch for epoch, _ in steps] == [1, 1, 1, 2, 2, 2]
    for epoch in (1, 2):
        assert sorted(i for e, chosen in steps for i in chosen if e == epoch) == list(range(10))
    assert train.plan(10, 4, 2, 5, seed=3) == steps[:5]


def test_learning_rate_rises_then_falls_to_nothing():
    rates = [train.learning_rate(step, 20, 0.2) for step in range(20)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(a > b > 0 for a, b in zip(rates[4:], rates[5:]))
    assert train.learning_rate(0, 1, 0.05) == 1.0


# ---------------------------------------------------------------- both packings, the same gradient


def lora_model(path, seed=0):
    """A frozen base with LoRA whose B is not zero, so that both halves have a gradient."""
    base = training.load_base(path, "none", tree=True)
    model = training.add_lora(base, path, None, 4, 8, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    training.checkpointing(model, "none")
    return model


def loss_and_gradient(model, batches):
    model.zero_grad()
    nll = sum(train.accumulate(model.get_base_model(), batch) for batch in batches)
    return nll, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def reference(model, samples, weights):
    """Straight from the definition: every sample through the whole model, all logits, autograd."""
    model.zero_grad()
    total = 0.0
    for sample, weight in zip(samples, weights):
        logits = model(input_ids=torch.tensor(sample.ids[None, :], dtype=torch.long)).logits[0]
        targets = torch.tensor(sample.ids[sample.n_prompt :], dtype=torch.long)
        loss = torch.nn.functional.cross_entropy(logits[sample.n_prompt - 1 : -1], targets, reduction="sum")
        (weight * loss).backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def assert_equal(model, samples, loss_norm="token", layouts=((4096, 0.0),)):
    """Loss and gradient of every layout (rows in a batch, cost of attention) are those of the definition."""
    weights = train.token_weights(samples, loss_norm)
    nll, gradient = reference(model, samples, weights)
    assert gradient.norm() > 0
    for max_rows, attention in layouts:
        for batches in (prefix_tree.pack_tree(samples, weights, max_rows, attention),
                        prefix_tree.pack_per_turn(samples, weights, max_rows)):
            nll_packed, gradient_packed = loss_and_gradient(model, batches)
            assert abs(nll_packed - nll) <= 1e-5 * nll
            assert (gradient_packed - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request, tmp_path_factory):
    return lora_model(tiny.model_dir(tmp_path_factory.mktemp("model"), request.param, "chatml"))


def test_attention_is_what_its_mask_says():
    """The kernel that takes a mask and looks no further, and the public function where that kernel does not fit."""
    torch.manual_seed(0)
    end = torch.tensor([9, 9, 5, 4, 5, 9, 8, 8, 9])
    row = torch.arange(9)
    tree = (row[None, :] <= row[:, None]) & (row[:, None] < end[None, :])
    for mask, seen in ((torch.zeros(1, 1, 9, 9).masked_fill_(~tree, -torch.inf), tree), (None, row[None, :] <= row[:, None])):
        for width in (16, 24):  # values as wide as keys, or wider
            query, key, value = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, width)
            found, _ = training._attend(None, query, key, value, mask, scaling=0.3)
            for head in range(4):
                scores = 0.3 * query[0, head] @ key[0, head // 2].T
                expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[0, head // 2]
                assert torch.allclose(found[0, :, head], expected, atol=1e-6)
    with pytest.raises(InputError, match="per-turn"):
        training._attend(None, query, key, value, None, softcap=30.0)


def test_what_attention_costs_does_not_depend_on_how_layers_are_kept(tmp_path):
    path = tiny.model_dir(tmp_path, "llama", "chatml")
    plain = training.attention_cost(training.load_base(path, "none", tree=True))
    assert 0.5 * plain < training.attention_cost(lora_model(path).get_base_model()) <= plain  # LoRA adds some weights


@pytest.mark.parametrize("template, kwargs, think, loss_norm", [
    ("chatml", {}, False, "token"),
    ("chatml", {}, False, "label"),
    ("llama3", {}, False, "token"),  # strips contents, so that history differs from what was generated
    ("qwen3", {}, True, "token"),  # drops old reasoning
    ("qwen3", {"enable_thinking": False}, False, "label"),  # a think block in the generation prompt, none in history
    ("tools", {}, False, "token"),
], ids=["chatml", "label", "llama3", "qwen3-drops-thoughts", "qwen3-empty-think", "tools"])
def test_both_packings_give_the_gradient_of_the_definition(model, tmp_path, template, kwargs, think, loss_norm):
    tokenizer = tiny.tokenizer(template)
    found, _ = tokenised([iteration(tmp_path, n=3, turns=3, think=think, kwargs=kwargs)], tokenizer)
    samples = [sample for samples in found for sample in samples]
    distinct = prefix_tree.distinct_tokens(samples)
    assert distinct < 0.7 * sum(len(s.ids) for s in samples)  # something is shared, whatever the template does
    several = 2 * max(len(s.ids) for s in samples)
    assert_equal(model, samples, loss_norm, layouts=[(4096, 0.0), (several, 0.0), (4096, 0.05)])


def sample(prompt, answer, name="s"):
    return Sample(name, np.array([*prompt, *answer], np.int32), len(prompt))


@pytest.mark.parametrize("samples", [
    [sample([5], [6])],
    [sample([5, 6, 7], [8]), sample([5, 6, 7], [8])],
    [sample([5, 6], [7, 8, 9]), sample([5, 6], [7, 8, 10])],
    [sample([5, 6], [7]), sample([5, 11], [12])],
    [sample([5, 6], [7]), sample([8, 9], [7])],
    [sample([5, 6], [7]), sample([5, 6, 7], [8]), sample([5, 6, 7, 8], [9])],
], ids=["single-token", "duplicates", "last-token", "one-token-overlap", "apart", "executed"])
def test_corner_cases_have_the_same_gradient(model, samples):
    assert_equal(model, samples)


def test_random_samples_have_the_same_gradient(model):
    """Ten forests of up to twelve samples over a small alphabet, so that they branch and overlap anywhere."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        pool = [rng.integers(3, 6, rng.integers(1, 12)) for _ in range(4)]
        samples = []
        for _ in range(rng.integers(1, 13)):
            prompt = np.concatenate([pool[rng.integers(4)], pool[rng.integers(4)]])[: rng.integers(1, 20)]
            samples.append(sample(prompt, rng.integers(3, 6, rng.integers(1, 6))))
        assert_equal(model, samples, layouts=[(int(rng.integers(25, 200)), float(rng.random() * 0.1))])


@pytest.mark.parametrize("how", ["on", "offload"])
def test_gradient_checkpointing_changes_nothing(tmp_path, how):
    path = tiny.model_dir(tmp_path, "llama", "chatml")
    samples = [sample([5, 6, 7], [8, 9]), sample([5, 6, 7, 10], [11, 12])]
    batches = prefix_tree.pack_tree(samples, [0.25, 0.25], 100)
    nll, gradient = loss_and_gradient(lora_model(path), batches)
    model = lora_model(path)
    training.checkpointing(model, how)
    model.zero_grad()
    again = sum(train.accumulate(model.get_base_model(), batch, offload=how == "offload") for batch in batches)
    assert again == pytest.approx(nll, rel=1e-6)
    other = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert (other - gradient).norm() <= 1e-5 * gradient.norm()


def test_logits_come_in_chunks(model, monkeypatch):
    """No more logits at once than a chunk: memory does not grow with labels times vocabulary."""
    samples = [sample([5, 6], list(range(7, 107)))]
    expected = loss_and_gradient(model, prefix_tree.pack_tree(samples, [0.01], 200))
    seen = []
    head = model.get_base_model().get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    monkeypatch.setattr(train, "LOGITS", 30 * head.weight.shape[0])
    found = loss_and_gradient(model, prefix_tree.pack_tree(samples, [0.01], 200))
    hook.remove()
    assert seen == [30, 30, 30, 10]
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()


def test_probe_lets_ordinary_models_pass(model):
    training.probe(model.get_base_model(), True, 4096)


def test_recurrent_models_are_sent_to_per_turn():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16,
                          n_groups=1, expand=2)
    base = Mamba2ForCausalLM(config)
    training.probe(base, False, 100)
    with pytest.raises(InputError, match="--packing per-turn"):
        training.probe(base, True, 100)


def test_sliding_windows_shorter_than_a_sample_are_refused():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, sliding_window=50, attn_implementation="sdpa")
    base = MistralForCausalLM(config)
    training.probe(base, True, 50)
    training.probe(base, False, 51)
    with pytest.raises(InputError, match="sliding-window attention over 50 tokens and a sample has 51.*per-turn"):
        training.probe(base, True, 51)


def test_logits_changed_after_the_head_are_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16,
                          num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.1,
                          attn_implementation="sdpa")
    with pytest.raises(InputError, match="gemma2 .*changes its logits"):
        training.probe(Gemma2ForCausalLM(config), False, 50)


# ---------------------------------------------------------------- the script


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


def test_rows_are_shared_out_evenly():
    """Three processes, each with its own share; every micro-batch has one owner, and no share is far above the mean."""
    rng = np.random.default_rng(0)
    samples = [sample(rng.integers(3, 400, 60), rng.integers(3, 400, 5)) for _ in range(40)]
    batches = train.pack(run.parse(train.Args, ["--data", "x", "--out", "y"]), samples, 0.0, 3)
    shares = []
    for rank in range(3):
        processes = training.Processes()
        processes.rank, processes.size = rank, 3
        shares.append(processes.share(batches, 0.0))
    assert sorted(id(batch) for share in shares for batch in share) == sorted(map(id, batches))
    rows = [sum(batch.n_rows for batch in share) for share in shares]
    assert max(rows) <= 1.1 * sum(rows) / 3


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


def test_nf4_gradients_are_those_of_the_rounded_weights(tmp_path):
    """A forward pass in eval mode (that of `probe`, say) makes bitsandbytes repack NF4 weights on CPU for a kernel without
    a backward pass; after that, gradients no longer went through the frozen layers. Nothing failed: the loss even fell."""
    path = tiny.model_dir(tmp_path, "llama", "chatml")
    samples = [sample([5, 6, 7], [8, 9]), sample([5, 6, 7, 10], [11, 12])]
    found = []
    for dequantised in (False, True):
        base = training.load_base(path, "nf4", tree=True)
        training.probe(base, True, 100)
        if dequantised:
            base = base.dequantize().requires_grad_(False)
        model = training.add_lora(base, path, None, 4, 8, seed=0)
        with torch.no_grad():
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
        found.append(loss_and_gradient(model, prefix_tree.pack_tree(samples, [0.25, 0.25], 100)))
    (nll, gradient), (nll_rounded, gradient_rounded) = found
    assert nll == pytest.approx(nll_rounded, rel=1e-5)
    assert (gradient - gradient_rounded).norm() <= 1e-4 * gradient_rounded.norm()


def test_other_settings_for_the_same_output_are_refused(home):
    common = ("--data", home / "iter_001", "--model", home / "base", "--max-steps", 1, "--out", home / "same")
    script(*common)
    with pytest.raises(InputError, match="lr = 0.001, now it is 0.1.*--overwrite"):
        script(*common, "--lr", "0.1")
    script(*common, "--lr", "0.1", "--overwrite")


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


# ---------------------------------------------------------------- arms, and what is measured for them


def test_steps_per_epoch_share_out_the_trajectories():
    for n, steps in ((10, 4), (67, 44), (5, 5), (7, 1)):
        made = train.plan(n, 99, 2, None, seed=1, steps_per_epoch=steps)
        assert [epoch for epoch, _ in made] == [1] * steps + [2] * steps
        sizes = [len(chosen) for _, chosen in made]
        assert max(sizes) - min(sizes) <= 1
        assert sorted(i for epoch, chosen in made if epoch == 2 for i in chosen) == list(range(n))


def nll_lines(path):
    return {(line["trajectory_id"], line["turn"]): line for line in map(json.loads, path.read_text().splitlines())}


def test_the_loss_of_labels_before_and_after(home, tmp_path):
    """After: what a dry run on the new adapter says of each label. Before: under the student that collected, which is
    the base, the adapter that training went on from, or (with all labels, from a fresh adapter) the last one."""
    base = home / "base"
    common = ("--model", base, "--epochs", 2, "--lr", "5e-3", "--batch-size", 2)

    def dry(data, adapter):
        script("--data", data, "--model", base, *(["--init-adapter", adapter] if adapter else []), "--dry-run", "--out",
               tmp_path / "none", "--label-nll", tmp_path / "nll.jsonl")  # fmt: skip
        assert not (tmp_path / "none").exists()
        return {key: line["before"] for key, line in nll_lines(tmp_path / "nll.jsonl").items()}

    def collected_by(directory, adapter, name):
        records = [trajectory(f"{name}-{n}", seed=n) for n in range(5)]
        who = {"model": f"hf:{base}", "adapter": adapter and str(adapter), "extra": {},
               "adapter_hash": adapter and hash_adapter(adapter)}  # fmt: skip
        for record in records:
            record["student"] = who
        write(directory, records, [label(r, turn) for r in records for turn in range(3)])
        return directory

    first = collected_by(tmp_path / "iter_001", None, "a")
    script("--data", first, *common, "--out", tmp_path / "one")
    lines = nll_lines(tmp_path / "one/label_nll.jsonl")
    assert len(lines) == 15
    for name, adapter in (("before", None), ("after", tmp_path / "one")):
        expected = dry(first, adapter)
        assert {key: line[name] for key, line in lines.items()} == pytest.approx(expected, rel=1e-4)
    assert sum(line["after"] for line in lines.values()) < 0.9 * sum(line["before"] for line in lines.values())
    for record in map(json.loads, (first / "trajectories.jsonl").read_text().splitlines()):
        actors = [m["actor"] for m in record["messages"] if m["role"] == "assistant"]
        for turn in range(3):
            assert lines[record["trajectory_id"], turn]["student_turns"] == actors[:turn].count("student")
    # by hand: the mean over tokens of what the definition gives
    (samples, *_), _ = tokenised([str(first)], models.load_tokenizer(str(base))[0])
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base)
    for turn, one in enumerate(samples):
        assert lines["a-0.i1.a0", turn]["before"] == pytest.approx(reference_loss(plain, [one]) / one.n_label, rel=1e-4)
        assert lines["a-0.i1.a0", turn]["tokens"] == one.n_label

    second = collected_by(tmp_path / "iter_002", tmp_path / "one", "b")
    expected = dry(second, tmp_path / "one")
    script("--data", second, *common, "--init-adapter", tmp_path / "one", "--out", tmp_path / "current", "--measure", 2)
    script("--data", first, second, *common, "--out", tmp_path / "union")
    unmeasured = script("--data", first, second, *common, "--measure", 0, "--out", tmp_path / "unmeasured")
    assert summary(unmeasured)["loss"] == summary(script("--data", first, second, *common, "--out", tmp_path / "union"))["loss"]
    assert not (tmp_path / "unmeasured/label_nll.jsonl").exists()
    for name, number in (("current", 6), ("union", 15)):
        lines = nll_lines(tmp_path / name / "label_nll.jsonl")
        assert len(lines) == number and lines.keys() <= expected.keys()
        assert {key: line["before"] for key, line in lines.items()} == pytest.approx(
            {key: expected[key] for key in lines}, rel=1e-4)  # fmt: skip
    one = (tmp_path / "unmeasured/adapter_model.safetensors").read_bytes()
    assert one == (tmp_path / "union/adapter_model.safetensors").read_bytes()  # measuring leaves no trace

    (tmp_path / "one").rename(tmp_path / "gone")
    lost = script("--data", first, second, *common, "--out", tmp_path / "lost")
    assert "the student that collected cannot be loaded" in lost[1]
    assert {line["before"] for line in nll_lines(tmp_path / "lost/label_nll.jsonl").values()} == {None}


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


def test_dropout_of_the_base_is_off(tmp_path, home):
    """Two passes over one sample have to agree, and a prefix tree with them."""
    config = json.loads((home / "base/config.json").read_text())
    shutil.copytree(home / "base", tmp_path / "base")
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    for tree in (True, False):
        base = training.load_base(str(tmp_path / "base"), "none", tree)
        assert {module.attention_dropout for module in base.modules() if hasattr(module, "attention_dropout")} == {0.0}
        training.probe(base, tree, 24)


@pytest.mark.parametrize("rope, reach", [
    ({"rope_type": "default", "rope_theta": 1e4}, None), ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 512),
    ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 64),
    ({"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64}}, 64),
])  # fmt: skip
def test_rotary_factors_that_hang_on_the_batch_bound_the_context(rope, reach):
    """With longrope a sample of 30 tokens had another loss packed with one of 120 than alone, and no error."""
    config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=512)
    config.get_text_config = lambda: config
    assert models.fixed_positions(config) == reach


def test_measuring_is_shared_between_processes(monkeypatch):
    shares = []
    for rank in range(4):
        processes = object.__new__(training.Processes)
        processes.rank, processes.size, loads = rank, 4, [0.0] * 4
        batches = [prefix_tree.pack_tree([Sample("s", np.arange(n + 4, dtype=np.int32), 2)], [1.0], 64)
                   for n in range(32)]  # fmt: skip
        shares.append([batch.n_rows for of in batches for batch in processes.share(of, 0.0, loads)])
    assert sorted(n for share in shares for n in share) == list(range(4, 36))
    assert [len(share) for share in shares] == [8] * 4  # one after the other, not all for the first
