"""Exports: merged is adapter on base, TRL trains on the tokens that we train on, cards say what the manifests say.

The runs are made here: tiny random models, real adapters, manifests as the scripts write them. One slow test makes its
run with the scripts themselves.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import chat, export, hf_policy, models, run, training, training_files
from common.errors import InputError
from tests import records as by_hand, tiny

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"max_turns": 9, "max_context": 2048, "max_tokens": 8192, "max_new_tokens": 64, "time_limit": 600.0,
          "command_timeout": 20.0}  # fmt: skip
TRL = "trl==1.16.0"


def adapter(base: str, out: Path, seed: int, scale: float = 0.05) -> None:
    """A random adapter: LoRA's B starts as zeros, which would export nothing."""
    model = training.add_lora(models.load_base(base, "none"), base, None, 4, 8, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=scale)
    out.mkdir(parents=True, exist_ok=True)
    training_files.save_adapter(model, out)


def manifest(path: Path, settings: dict, same: dict, summary: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "same": same, "summary": summary, "commit": "c0ffee", "diff": "",
                                "packages": {"torch": "2"}, "finished": 2.0, "seconds": 1.0}))  # fmt: skip


def make_run(home: Path, base: str, rates=(0.25, 0.5), aggregate="current", kwargs=None, quant="none", **trained):
    """Iterations of two trajectories with three labels each, evaluated at these rates; the last label is invalid."""
    for number, rate in enumerate(rates, start=1):
        here = home / f"iter_{number:03d}"
        records = [by_hand.trajectory(f"toy-{n}", turns=3, seed=10 * number + n, kwargs=kwargs) for n in range(2)]
        for record in records:
            record |= {"iteration": number, "trajectory_id": f"{record['instance_id']}.i{number}.a0"}
        labels = [by_hand.label(of, turn) | {"iteration": number} for of in records for turn in range(3)]
        labels[-1]["valid"] = False
        by_hand.write(here, records, labels)
        policy = {"model": f"hf:{base}", "extra": {"chat_template_kwargs": kwargs} if kwargs else {}}
        manifest(here / "trajectories.jsonl.manifest.json",
                 {"tasks": "toy:train", "sample": 2, "mix": "turn", "schedule": "linear:2", "beta": None},
                 {"teacher": {"model": "oracle"}, "student": policy, "prompts": ["toy-1"], "limits": LIMITS},
                 {"trajectories": 2, "beta": 1.0 / number, "teacher_turn_share": 0.7})  # fmt: skip
        manifest(here / "labels.jsonl.manifest.json", {}, {"teacher": {"model": "oracle"}}, {"agree": 0.75})
        adapter(base, here / "adapter", seed=number)
        union = range(1, number + 1) if aggregate == "union" else [number]
        data, files = [home / f"iter_{n:03d}" for n in union], ("trajectories.jsonl", "labels.jsonl")
        before = home / f"iter_{number - 1:03d}" / "adapter" if aggregate == "current" and number > 1 else None
        manifest(here / "adapter/manifest.json",
                 {"data": [str(path) for path in data], "model": base, "init_adapter": before and str(before),
                  "epochs": 2, "batch_size": 1, "lr": 2e-3, "max_context": 2048, "seed": 7}
                 | trained.get("settings", {}),
                 {"inputs": [run.hash_file(path / name) for path in data for name in files],
                  "init_adapter": before and run.hash_file(before / "adapter_model.safetensors")},
                 {"labels": 5 * len(data), "steps": 4, "loss": 0.125, "quant": quant, "labels_too_long": 0}
                 | trained.get("summary", {}))  # fmt: skip
        digest = hf_policy.hash_adapter(str(here / "adapter"))
        scored = policy | {"adapter_hash": digest, "sampling": {"temperature": 0.0}}
        manifest(here / "eval/manifest.json", {"tasks": "toy:dev", "grader": "auto", "student": "hf:..."},
                 {"student": scored, "limits": LIMITS},
                 {"tasks": 80, "resolved": round(80 * rate), "rate": rate, "rate_low": rate - 0.1,
                  "rate_high": rate + 0.1, "infra_errors": 0})  # fmt: skip
    return home


def give(home: Path, form: str, out: Path, **more) -> Path:
    export.export(home, export.Args(format=form, out=str(out), **more))
    return out


def greedy(model, tokenizer, text="The test fails. Find total.", tokens=24):
    ids = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        return made[0].tolist(), model(**ids).logits


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("arch, template", [("llama", "chatml"), ("qwen3", "qwen3")])
def test_merged_is_the_adapter_on_its_base(tmp_path, arch, template):
    base = tiny.model_dir(tmp_path, arch, template)
    home = make_run(tmp_path / "run", base, rates=(0.5,))
    out = give(home, "merged", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    two = models.load_adapter(models.load_base(base, "none"), base, str(home / "iter_001/adapter"))
    expected, logits = greedy(two, tokenizer)
    found, ours = greedy(AutoModelForCausalLM.from_pretrained(out), tokenizer)
    assert found == expected and torch.allclose(ours, logits, atol=1e-4)
    assert greedy(models.load_base(base, "none"), tokenizer)[0] != expected  # the adapter does something
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    ends = [json.loads((Path(where) / "generation_config.json").read_text())["eos_token_id"] for where in (base, out)]
    assert ends[0] == ends[1]


def test_sums_are_made_in_fp32_and_rounded_once(tmp_path):
    """Stored in bf16, a weight keeps 8 bits: what LoRA adds must not be rounded before it is added."""
    base = tiny.model_dir(tmp_path)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict()
    home = make_run(tmp_path / "run", base, rates=(0.5,))
    merged = AutoModelForCausalLM.from_pretrained(give(home, "merged", tmp_path / "out"), dtype="auto").state_dict()
    from safetensors.torch import load_file

    lora = load_file(home / "iter_001/adapter/adapter_model.safetensors")
    changed = 0
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        a, b = (lora.get(f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight") for part in "AB")
        expected = plain[name] if a is None else (plain[name].float() + (b @ a) * 2).bfloat16()  # alpha / r = 8 / 4
        assert torch.equal(weight, expected), name
        changed += a is not None
    assert changed == 14  # seven linear layers in each of two blocks


def test_the_adapter_goes_out_as_it_is_with_its_facts(tmp_path, capsys):
    base = tiny.model_dir(tmp_path)
    home = make_run(tmp_path / "run", base)
    out = give(home, "peft", tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (home / "iter_002/adapter" / name).read_bytes()
    said = capsys.readouterr()
    assert said.out.startswith("summary format=peft iteration=2 ")
    assert f"04_eval.py --tasks toy:dev:4 --student hf:{base},adapter={out} --out try --max-turns 9" in said.err
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "peft" and "lora" in head["tags"]
    assert "base_model" not in head and "license" not in head  # a directory of this machine means nothing on a hub
    for fact in ("DAgger", "linear:2", "oracle", "`toy:train`, 2 in each iteration", "| 10 of iterations 1, 2 |",
                 "8 steps", "rank 4, alpha 8", "c0ffee", "40/80 = 50% (40% to 60%) on `toy:dev`", "chose the iteration",
                 "not scored on a test split", "Fix the bug in the repository."):  # fmt: skip
        assert fact in text, fact
    assert json.loads((tmp_path / "out.manifest.json").read_text())["same"]["iteration"] == 2


def test_another_iteration_than_the_best(tmp_path):
    home = make_run(tmp_path / "run", tiny.model_dir(tmp_path))
    shutil.copytree(home / "iter_002/eval", home / "test/iter_002")
    place = home / "test/iter_002/manifest.json"
    place.write_text(place.read_text().replace("toy:dev", "toy:test"))
    text = (give(home, "peft", tmp_path / "out", iteration=1) / "README.md").read_text()
    assert "20/80 = 25%" in text and "(iteration 2 scored more)" in text and "| labels | 5 of iteration 1 |" in text
    assert "was not scored on a test split" in text and "It was measured on `toy:dev` as above, and on nothing" in text
    text = (give(home, "peft", tmp_path / "two") / "README.md").read_text()
    assert "tasks that chose nothing: 40/80 = 50%" in text and "on `toy:dev` and `toy:test` as above" in text
    shutil.rmtree(home / "iter_002/eval")
    place.write_text(place.read_text().replace('"adapter_hash": "', '"adapter_hash": "0'))
    with pytest.raises(InputError, match="not the adapter that was evaluated .* 04_eval.py --out .*test/iter_002"):
        give(home, "peft", tmp_path / "three", iteration=2)


def test_an_adapter_of_a_quantised_base_says_what_the_change_costs(tmp_path, capsys):
    base = tiny.model_dir(tmp_path)
    losses = {"loss_nf4": 0.1, "loss_plain": 0.2, "gap_label_tokens": 33}
    home = make_run(tmp_path / "run", base, rates=(0.5,), quant="nf4", summary=losses)
    card = (give(home, "merged", tmp_path / "m") / "README.md").read_text()
    gap = "the mean loss per label token is 0.1000 on NF4 and 0.2000 on the plain base (33 label tokens)"
    assert gap in card and f"merged into the plain one; {gap}" in capsys.readouterr().err
    card = (give(home, "peft", tmp_path / "p") / "README.md").read_text()
    assert f"adapter={tmp_path / 'p'},quant=nf4" in card and gap in card
    home = make_run(tmp_path / "other", base, rates=(0.5,), quant="nf4")
    assert "was not measured" in (give(home, "peft", tmp_path / "q") / "README.md").read_text()


# ---------------------------------------------------------------- the labels


# template, its arguments, what it puts behind a turn, whether our tiny tokenizer joins the "\n\n" that ends a prompt
# with what follows (the published tokenizers of these families do not)
CASES = [("chatml", None, "\n", False), ("tools", None, "\n", False), ("llama3", None, "", True),
         ("qwen3", {"enable_thinking": False}, "\n", True)]  # fmt: skip


def read_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def ours(home: Path, tokenizer, number: int) -> list[tuple[list[int], int]]:
    """(ids, n_prompt) of every sample of an iteration, as 03_train.py makes them."""
    trajectories, _ = by_hand.tokenised([str(home / f"iter_{number:03d}")], tokenizer)
    return [(sample.ids.tolist(), sample.n_prompt) for samples in trajectories for sample in samples]


@pytest.mark.parametrize("template, kwargs, behind, joins", CASES)
def test_a_line_is_what_is_trained_on(tmp_path, template, kwargs, behind, joins):
    """TRL renders prompt and completion with the template: our tokens, and what the template puts behind a turn."""
    home = make_run(tmp_path / "run", tiny.model_dir(tmp_path, template=template), rates=(0.5,), kwargs=kwargs)
    lines = read_lines(give(home, "trl", tmp_path / "out"))
    tokenizer = tiny.tokenizer(template)
    samples = ours(home, tokenizer, 1)
    assert len(lines) == len(samples) == 5
    for line, (ids, n_prompt) in zip(lines, samples):
        assert line.get("chat_template_kwargs") == kwargs and set(line["prompt"][0]) == {"role", "content"}
        render = dict(tokenize=True, return_dict=False, **(kwargs or {}))
        assert tokenizer.apply_chat_template(line["prompt"], add_generation_prompt=True, **render) == ids[:n_prompt]
        whole = tokenizer.apply_chat_template(line["prompt"] + line["completion"], **render)
        assert tokenizer.decode(whole) == tokenizer.decode(ids) + behind
        assert (whole[: len(ids)] == ids) != joins


def test_where_the_template_adds_an_empty_think_block(tmp_path):
    """Qwen3 with thinking on: the last answer is rendered with a block that the generation prompt does not open."""
    home = make_run(tmp_path / "run", tiny.model_dir(tmp_path, "qwen3", "qwen3"), rates=(0.5,))
    line, tokenizer = read_lines(give(home, "trl", tmp_path / "out"))[0], tiny.tokenizer("qwen3")
    ids, n_prompt = ours(home, tokenizer, 1)[0]
    whole = tokenizer.apply_chat_template(line["prompt"] + line["completion"], tokenize=True, return_dict=False)
    prompt, label = tokenizer.decode(ids[:n_prompt]), tokenizer.decode(ids[n_prompt:])
    assert tokenizer.decode(whole) == f"{prompt}<think>\n\n</think>\n\n{label}\n"


def test_the_iterations_that_trained_the_adapter(tmp_path):
    base = tiny.model_dir(tmp_path)
    places = {}
    for aggregate in ("current", "union", "window"):  # a window of one here
        home = make_run(tmp_path / aggregate, base, aggregate=aggregate)
        lines = read_lines(give(home, "trl", tmp_path / f"{aggregate}-out"))
        places[aggregate] = [(line["iteration"], line["trajectory_id"], line["turn"]) for line in lines]
    both = [(i, f"toy-{n}.i{i}.a0", t) for i in (1, 2) for n in (0, 1) for t in range(3) if (n, t) != (1, 2)]
    assert places["current"] == places["union"] == both
    assert places["window"] == both[5:]


def test_labels_that_were_left_out_stay_out(tmp_path):
    """--keep resolved trains on resolved trajectories alone."""
    home = make_run(tmp_path / "run", tiny.model_dir(tmp_path), rates=(0.5,), settings={"keep": "resolved"})
    grades = [{"schema": 1, "instance_id": f"toy-{n}", "trajectory_id": f"toy-{n}.i1.a0", "resolved": n == 1,
               "tests_status": {}, "exit_status": "submitted", "failure_mode": None, "turns": 3, "tokens": {},
               "seconds": 1.0, "tampered": False} for n in range(2)]  # fmt: skip
    (home / "iter_001/grades").mkdir()
    (home / "iter_001/grades/results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in grades))
    lines = read_lines(give(home, "trl", tmp_path / "out"))
    assert [(line["trajectory_id"], line["turn"]) for line in lines] == [("toy-1.i1.a0", 0), ("toy-1.i1.a0", 1)]


def test_the_card_says_which_labels_were_chosen_and_how_many_steps(tmp_path):
    home = make_run(tmp_path / "run", tiny.model_dir(tmp_path), settings={"steps_per_epoch": 44})
    plain = (give(home, "peft", tmp_path / "plain") / "README.md").read_text()
    assert "longer and left out: 0 |" in plain and "| teacher | oracle (the scripted expert of the embedded tasks) |" in plain
    assert 'Its system prompt (`toy-1`; in the row of a task `"prompt": "toy"`)' in plain
    assert "44 in each epoch" in plain and "| labels | 10 of iterations 1, 2 |" in plain
    for number, most in ((1, 40), (2, 30)):
        path = home / f"iter_00{number}/labels.jsonl.manifest.json"
        content = json.loads(path.read_text())
        content["settings"] |= {"keep": "resolved", "label_states": "uncertain:0.5", "max_labels": most}
        content["same"]["teacher"] = {"model": "openai:big"}  # who labelled counts, whoever acted
        path.write_text(json.dumps(content))
    path = home / "iter_001/adapter/manifest.json"
    content = json.loads(path.read_text())
    content["summary"]["labels_too_long"] = 3
    path.write_text(json.dumps(content))
    card = (give(home, "peft", tmp_path / "chosen") / "README.md").read_text()
    assert "longer and left out: 3 |" in card and "| teacher | openai:big |" in card
    assert "; those of resolved trajectories alone; --label-states uncertain:0.5; at most 40; 30 in an iteration |" in card


def test_an_exported_adapter_knows_what_base_it_was_trained_on(tmp_path):
    """hf:MODEL,adapter=EXPORT is to act as the student of the run did, without a quant= of its own."""
    home = make_run(tmp_path / "run", tiny.model_dir(tmp_path))
    for number in (1, 2):
        path = home / f"iter_00{number}/adapter/manifest.json"
        content = json.loads(path.read_text())
        content["summary"]["quant"] = "nf4"
        path.write_text(json.dumps(content))
    assert models.trained_on(str(give(home, "peft", tmp_path / "out"))) == "nf4"
    assert models.trained_on(f"{tmp_path / 'out'}/") == "nf4" and models.trained_on(str(tmp_path)) == "none"


def test_text_that_looks_like_a_special_token_stays_text(tmp_path):
    assert "<s>" in chat.special_tokens(tiny.tokenizer("tools"))
    home = make_run(tmp_path / "run", tiny.model_dir(tmp_path, template="tools"), rates=(0.5,))
    path = home / "iter_001/trajectories.jsonl"
    path.write_text(path.read_text().replace("wrong total", "wrong <s> total"))
    made = json.loads((home / "iter_001/adapter/manifest.json").read_text())
    made["same"]["inputs"].append(run.hash_file(path))
    (home / "iter_001/adapter/manifest.json").write_text(json.dumps(made))
    assert "wrong < s> total" in read_lines(give(home, "trl", tmp_path / "out"))[0]["prompt"][1]["content"]


def test_datasets_loads_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    kwargs = {"enable_thinking": False}
    home = make_run(tmp_path / "run", tiny.model_dir(tmp_path, "qwen3", "qwen3"), kwargs=kwargs)
    out = give(home, "trl", tmp_path / "out")
    how = dict(split="train", cache_dir=str(tmp_path / "cache"))
    loaded = datasets.load_dataset("json", data_files=str(out / "train.jsonl"), **how)
    assert loaded.to_list() == read_lines(out)
    assert datasets.load_dataset(str(out), **how).to_list() == loaded.to_list()  # by the card's own head
    assert "max_length=2048" in (out / "README.md").read_text()


# ---------------------------------------------------------------- bad input, and what a stop leaves


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_cannot_be_handed_on(tmp_path):
    base = tiny.model_dir(tmp_path)
    home = make_run(tmp_path / "run", base)

    def refused(why: str, form: str = "peft", run_home: Path = home, **more):
        with pytest.raises(InputError, match=why):
            give(run_home, form, tmp_path / "out", **more)
        assert not list(tmp_path.glob("out*"))

    refused("no such directory", run_home=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no finished stage", run_home=tmp_path / "empty")
    manifest(tmp_path / "served/iter_000/eval/manifest.json", {"student": "openai:m@http://x"}, {}, {"rate": 0.5})
    refused("no iteration .* has a trained adapter.*openai:m@http://x, whose weights", run_home=tmp_path / "served")
    refused("--iteration 5: .*has adapters of 1, 2", iteration=5)

    here = home / "iter_002/adapter"
    weights, config = here / "adapter_model.safetensors", here / "adapter_config.json"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:1000])
    refused("gone or damaged")
    weights.unlink()
    refused("gone or damaged")
    weights.write_bytes(kept[:-4] + b"\0\0\0\1")
    refused("not the adapter that was evaluated")
    weights.write_bytes(kept)
    config.rename(config.with_suffix(".away"))
    refused("no adapter there")
    config.with_suffix(".away").rename(config)

    labels = home / "iter_001/labels.jsonl"
    labels.write_text(labels.read_text().replace("Better", "Worse"))
    refused("iter_001: trajectories.jsonl and labels.jsonl are not those", "trl")
    adapter(base, home / "iter_001/adapter", seed=99)
    refused("no adapter of this run any more", "trl")
    text = (give(home, "peft", tmp_path / "fine") / "README.md").read_text()
    assert "an adapter that is not in the run any more" in text


def test_an_adapter_that_does_not_fit_its_base(tmp_path):
    small, large = (tiny.model_dir(tmp_path / str(hidden), hidden=hidden) for hidden in (64, 128))
    home = make_run(tmp_path / "run", small, rates=(0.5,))
    edit(home / "iter_001/adapter/manifest.json", lambda content: content["settings"].update(model=large))
    with pytest.raises(InputError, match="made for .*64-0, not for"):
        give(home, "merged", tmp_path / "out")
    renamed = Path(small).with_name("same") / Path(small).name
    renamed.parent.mkdir()
    Path(large).rename(renamed)
    edit(home / "iter_001/adapter/manifest.json", lambda content: content["settings"].update(model=str(renamed)))
    with pytest.raises(InputError, match="does not fit"):
        give(home, "merged", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch):
    home = make_run(tmp_path / "run", tiny.model_dir(tmp_path), rates=(0.5,))
    out = tmp_path / "out"

    def breaks(student, half):
        (half / "adapter_config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setitem(export.WRITE, "peft", breaks)
    with pytest.raises(KeyboardInterrupt):
        give(home, "peft", out)
    assert not list(tmp_path.glob("out*"))
    monkeypatch.undo()
    (tmp_path / ".out.half-exported").mkdir()  # what kill -9 leaves
    (tmp_path / "out.old").mkdir()  # somebody's
    give(home, "peft", out)
    assert {path.name for path in tmp_path.iterdir() if "out" in path.name} == {"out", "out.manifest.json", "out.old"}
    with pytest.raises(InputError, match="--overwrite replaces it"):
        give(home, "peft", out)
    (out / "stray").touch()
    give(home, "peft", out, overwrite=True)
    assert not (out / "stray").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis").touch()
    with pytest.raises(InputError, match="not written by this command"):
        give(home, "peft", tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious/thesis").exists()


def test_the_command(tmp_path):
    home = make_run(tmp_path / "run", tiny.model_dir(tmp_path), rates=(0.5,))

    def command(*words):
        return subprocess.run([sys.executable, "-m", "common.export", *map(str, words)], cwd=ROOT, capture_output=True,
                              text=True)  # fmt: skip

    done = command(home, "--format", "peft")
    assert done.returncode == 0 and (home / "export/peft/README.md").is_file(), done.stderr
    assert str(home) in json.loads((home / "export/peft.manifest.json").read_text())["command"]
    for words in ((home, "--format", "gguf"), ("--format", "peft"), (home / "iter_001", "--format", "peft"),
                  (home, "--format", "peft", "--out", "."), (home, "--format", "peft", "--out", "")):  # fmt: skip
        done = command(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
