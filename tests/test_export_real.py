"""Exports of the real student: as it generates, in vLLM, in TRL's trainer, and of a run that the scripts made."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from common import chat, embedded, jsonl
from tests import tiny
from tests.test_export import CASES, ROOT, TRL, give, make_run, ours, read_lines


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The embedded student with a random adapter that changes what it says, as a run, merged."""
    home = make_run(tmp_path_factory.mktemp("real") / "run", embedded.NAME, rates=(0.5,))
    return home, give(home, "merged", home.parent / "merged")


def said(spec: str, tokens: int = 16) -> str:
    from tests import test_vllm

    policy = test_vllm.open_policy(spec, tokens)
    try:
        return test_vllm.ask(policy).text
    finally:
        policy.close()


@pytest.mark.slow
def test_the_real_student_merged(real):
    home, merged = real
    two = said(f"hf:{embedded.NAME},adapter={home}/iter_001/adapter")
    assert said(f"hf:{merged}") == two != said(f"hf:{embedded.NAME}")


@pytest.mark.slow
def test_the_real_template(real):
    """SmolLM2's, as TRL renders it: our token ids and a newline."""
    home, merged = real
    tokenizer = AutoTokenizer.from_pretrained(merged)
    lines = read_lines(give(home, "trl", home.parent / "trl"))
    for line, (ids, n_prompt) in zip(lines, ours(home, tokenizer, 1), strict=True):
        whole = tokenizer.apply_chat_template(line["prompt"] + line["completion"], tokenize=True, return_dict=False)
        assert whole == ids + chat.encode(tokenizer, "\n")


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_serves_the_merged_directory(real, tmp_path, monkeypatch):
    """Greedy, in fp32, the text of transformers."""
    from common import serve
    from tests import test_vllm

    if not (test_vllm.RIG / "installed").exists():
        pytest.skip("no vLLM for CPU: tests/vllm_rig.sh builds it")
    monkeypatch.setenv("SWE_DAGGER_VLLM", str(test_vllm.RIG / "bin/vllm"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    expected = said(f"hf:{real[1]}")
    try:
        assert said(f"vllm:{real[1]}{test_vllm.ARGS}") == expected
    finally:
        serve.leave()


@pytest.fixture(scope="module")
def with_trl(tmp_path_factory):
    """The environment of a process that can import trl: its own package on top of ours, which ours never sees."""
    target = tmp_path_factory.mktemp("trl")
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), TRL],
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        pytest.skip(f"{TRL} cannot be installed here: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return os.environ | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}


STEP = """
import json, sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

for file, model, home in json.loads(sys.argv[1]):
    settings = SFTConfig(output_dir=home, max_steps=1, per_device_train_batch_size=5, max_length=2048, use_cpu=True,
                         bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
                         train_sampling_strategy="sequential")
    trainer = SFTTrainer(model=AutoModelForCausalLM.from_pretrained(model), args=settings,
                         train_dataset=load_dataset("json", data_files=file, split="train", cache_dir=home),
                         processing_class=AutoTokenizer.from_pretrained(model))
    batch = next(iter(trainer.get_train_dataloader()))
    trained = [[token for token in line if token != -100] for line in batch["labels"].tolist()]
    trainer.train()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    print("found", json.dumps([trained, trainer.state.global_step, loss]))
"""


@pytest.mark.slow
def test_a_step_of_trl(tmp_path, with_trl):
    """SFTTrainer masks the prompt and trains on the tokens that we train on, and on what the template puts behind."""
    jobs, homes = [], []
    for template, kwargs, _, _ in CASES:
        here = tmp_path / template
        base = tiny.model_dir(here, "qwen3" if template == "qwen3" else "llama", template)
        homes.append(make_run(here / "run", base, rates=(0.5,), kwargs=kwargs))
        jobs.append([str(give(homes[-1], "trl", here / "out") / "train.jsonl"), base, str(here / "trl")])
    done = subprocess.run([sys.executable, "-c", STEP, json.dumps(jobs)], env=with_trl, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("found ") for line in done.stdout.splitlines() if line.startswith("found ")]
    for line, home, (template, _, behind, joins) in zip(lines, homes, CASES, strict=True):
        trained, steps, loss = json.loads(line)
        tokenizer = tiny.tokenizer(template)
        expected = [(ids[n_prompt:], chat.encode(tokenizer, behind)) for ids, n_prompt in ours(home, tokenizer, 1)]
        if joins:  # the "\n\n" in two tokens is no longer the prompt's one, and so counts as completion
            texts = ["\n\n" + tokenizer.decode(label) + behind for label, _ in expected]
            assert [tokenizer.decode(found) for found in trained] == texts
        else:
            assert trained == [label + tail for label, tail in expected]
        assert steps == 1 and 0 < loss < 20


@pytest.mark.slow
def test_the_measurement_beside_trl_runs(tmp_path, with_trl):
    """tests/bench/peer_trl.py: the first step has the same loss in all trainers that take the same labels for it."""
    base = tiny.model_dir(tmp_path, "llama", "chatml")
    home = make_run(tmp_path / "run", base, rates=(0.5,))
    done = subprocess.run([sys.executable, ROOT / "tests/bench/peer_trl.py", "--peer", sys.executable, "--data",
                           home / "iter_001", "--model", base, "--labels", "4", "--step", "2", "--at-once", "2"],
                          env=with_trl, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [["ours", "tree"], ["ours", "per-turn"], ["TRL", "padded"], ["TRL", "packed"]]
    losses = [float(row[4]) for row in rows[2:5]]
    assert losses == pytest.approx([losses[0]] * 3, abs=2e-4)


@pytest.mark.slow
def test_a_run_of_the_scripts(tmp_path):
    """What the scripts write today is what an export reads."""

    def script(name, *words):
        done = subprocess.run([sys.executable, ROOT / name, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    base = tiny.model_dir(tmp_path)
    for number in (1, 2):
        here, before = tmp_path / f"run/iter_{number:03d}", tmp_path / f"run/iter_{number - 1:03d}"
        script("01_collect.py", "--tasks", "toy:train", "--sample", 2, "--iteration", number, "--teacher", "oracle",
               "--mix", "teacher", "--out", here / "trajectories.jsonl")  # fmt: skip
        script("02_relabel.py", "--trajectories", here / "trajectories.jsonl", "--teacher", "oracle", "--out",
               here / "labels.jsonl")  # fmt: skip
        script("03_train.py", "--data", here, "--model", base, "--max-context", 4096, "--epochs", 1, "--out",
               here / "adapter", *(["--init-adapter", before / "adapter"] if number == 2 else []))  # fmt: skip
        script("04_eval.py", "--tasks", "toy:dev:2", "--student", f"hf:{base},adapter={here}/adapter", "--max-turns", 1,
               "--iteration", number, "--out", here / "eval")  # fmt: skip
    lines = read_lines(give(tmp_path / "run", "trl", tmp_path / "trl", iteration=2))
    labels = [label for n in (1, 2) for label in jsonl.read(tmp_path / f"run/iter_{n:03d}/labels.jsonl", "label")]
    assert [line["completion"][0]["content"] for line in lines] == [label["label"] for label in labels]
    text = (give(tmp_path / "run", "peft", tmp_path / "peft") / "README.md").read_text()
    assert "0/2 = 0%" in text and "supervised fine-tuning" in text and "grader `local`" in text
