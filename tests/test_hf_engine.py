"""hf: generation against plain transformers: the same greedy text, alone or in company, with and without kept keys.

Tiny random models in float32; every number here would catch a wrong position, a wrong mask or a neighbour's row.
"""

import threading
import time

import pytest
import tiny
import torch

from common import hf_engine, models
from common.errors import InfraError, InputError


def reference(path: str, ids: list[int], limit: int) -> list[int]:
    """What transformers' own generate says, greedily, for one prompt: new tokens up to and including the end."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    out = model.generate(torch.tensor([ids]), max_new_tokens=limit, do_sample=False)
    return out[0, len(ids) :].tolist()


def prompts(n: int, seed: int = 0, longest: int = 120) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (n,), generator=rng).tolist()
    return [torch.randint(10, 390, (length,), generator=rng).tolist() for length in lengths]


def engine(path: str, rows: int = 8, temperature: float = 0.0, top_p: float = 1.0, stop=(), adapter=None):
    return hf_engine.Engine(path, adapter, "none", stop=set(stop), temperature=temperature, top_p=top_p, rows=rows)


def ask_all(machine, asked: list[list[int]], limits, names=None, seed: int = 0) -> list[hf_engine.Generated]:
    """All at once, each from its own thread."""
    answers: list = [None] * len(asked)

    def one(i: int) -> None:
        try:
            name = (names or range(len(asked)))[i]
            answers[i] = machine.generate(asked[i], limit=limits[i], seed=seed + i, episode=name)
        except Exception as error:  # noqa: BLE001
            answers[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def whole(made: hf_engine.Generated, ends: set[int], expected: list[int]) -> list[int]:
    """The generated ids with the stopping token that `ids` leaves out."""
    return made.ids + expected[len(made.ids) :][:1] if made.stopped and expected[-1] in ends else made.ids


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_greedy_equals_transformers(tmp_path, arch, rows):
    """16 prompts of mixed lengths and limits on 1, 5 and 16 rows: what generate() says for each alone, all tokens."""
    path = tiny.model_dir(tmp_path, arch)
    asked = prompts(16)
    limits = [5 + 3 * i for i in range(16)]
    machine = engine(path, rows)
    answers = ask_all(machine, asked, limits)
    machine.close()
    for ids, limit, made in zip(asked, limits, answers):
        expected = reference(path, ids, limit)
        assert whole(made, machine.stop, expected) == expected
        assert made.stopped == (expected[-1] in machine.stop)
        assert made.tokens_out == len(expected)


def test_a_long_prompt_is_read_in_pieces(tmp_path, monkeypatch):
    """Prompts beyond the tokens of one step, while others decode: nothing changes."""
    monkeypatch.setitem(hf_engine.PREFILL_TOKENS, "cpu", 16)
    path = tiny.model_dir(tmp_path)
    asked = prompts(6, seed=3, longest=200)
    machine = engine(path, rows=6)
    answers = ask_all(machine, asked, [20] * 6)
    machine.close()
    for ids, made in zip(asked, answers):
        expected = reference(path, ids, 20)
        assert whole(made, machine.stop, expected) == expected


def test_kept_keys_change_nothing(tmp_path):
    """Episodes of several turns. A turn goes on from the last one, takes part of it back, or has nothing in common."""
    path = tiny.model_dir(tmp_path, "qwen3")
    machine = engine(path, rows=4)
    starts = prompts(4, seed=5, longest=60)
    extra = prompts(12, seed=6, longest=30)
    asked, limits = [list(ids) for ids in starts], [12] * 4
    for turn in range(3):
        answers = ask_all(machine, asked, limits)
        for i, made in enumerate(answers):
            expected = reference(path, asked[i], 12)
            assert whole(made, machine.stop, expected) == expected
            if turn and i < 3:
                assert made.reused > 0
        for i in range(4):
            said = asked[i] + answers[i].ids
            if i == 0:
                asked[i] = said + extra[turn]  # the usual case
            elif i == 1:
                asked[i] = said[:-4] + extra[turn]  # the answer tokenises differently the second time
            elif i == 2:
                asked[i] = said  # nothing new at all
            else:
                asked[i] = extra[turn + 4]  # another conversation under the same name
    machine.close()


def test_reused_is_the_longest_common_prefix(tmp_path):
    path = tiny.model_dir(tmp_path)
    machine = engine(path, rows=2)
    prompt = prompts(1, seed=9)[0]
    first = machine.generate(prompt, limit=8, seed=0, episode="e")
    assert first.reused == 0
    said = prompt + first.ids
    kept = len(said) if first.stopped else len(said) - 1  # the last sampled token was never read
    assert machine.generate(said + [33, 34, 35], limit=4, seed=0, episode="e").reused == kept
    assert machine.generate(said + [33, 34, 35], limit=4, seed=0, episode="other").reused == 0
    machine.forget("e")
    assert machine.generate(prompt, limit=4, seed=0, episode="e").reused == 0
    machine.close()


def test_more_episodes_than_rows(tmp_path):
    """20 requests over 3 rows: the idle ones lose what was kept, nobody loses an answer."""
    path = tiny.model_dir(tmp_path)
    asked = prompts(20, seed=2)
    machine = engine(path, rows=3)
    for _ in range(2):
        answers = ask_all(machine, asked, [9] * 20)
        for ids, made in zip(asked, answers):
            expected = reference(path, ids, 9)
            assert whole(made, machine.stop, expected) == expected
    machine.close()


def test_little_memory_means_fewer_rows(tmp_path):
    """A store that fits two wide rows serves long conversations two at a time, and refuses what fits not even alone."""
    path = tiny.model_dir(tmp_path)
    machine = engine(path, rows=4)
    machine.generate([20, 21], limit=1, seed=0, episode="load")
    machine.budget = machine.token_bytes * 2 * 384
    asked = prompts(4, seed=2, longest=30) + [list(range(20, 320)) for _ in range(3)]
    answers = ask_all(machine, asked, [9] * 7)
    for ids, made in zip(asked, answers):
        expected = reference(path, ids, 9)
        assert whole(made, machine.stop, expected) == expected
    with pytest.raises(InfraError, match="max-context"):
        machine.generate(list(range(20, 300)) * 4, limit=9, seed=0, episode="big")
    machine.close()


def test_what_fits_nowhere_fails_alone(tmp_path, monkeypatch):
    """A conversation that memory has no room for, and one time without memory, cost those who asked, and nobody else."""
    path, asked = tiny.model_dir(tmp_path), prompts(3)
    machine = engine(path)
    machine.generate(asked[1], limit=4, seed=1, episode="d")
    room = 2 * machine.token_bytes * hf_engine.COLUMNS * 2  # half of it is used: two rows of COLUMNS, or one of twice as many
    monkeypatch.setattr(hf_engine, "_available_memory", lambda: room)
    machine = engine(path, rows=2)
    big, small = ask_all(machine, [asked[0] * 40, asked[1]], [4, 4])
    assert isinstance(big, InfraError) and "no memory for a conversation of" in str(big)
    assert len(small.ids) == 4
    step, failed = hf_engine.Engine._step, []

    def once(self):
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self)

    monkeypatch.setattr(hf_engine.Engine, "_step", once)
    with pytest.raises(InfraError, match="out of GPU memory"):
        machine.generate(asked[2], limit=4, seed=0, episode="c")
    assert machine.generate(asked[1], limit=4, seed=1, episode="d").ids == small.ids
    machine.close()
    with pytest.raises(InfraError, match="closed"):
        machine.generate(asked[2], limit=4, seed=0, episode="e")


def test_seconds_begin_with_a_place_in_the_batch(tmp_path, monkeypatch):
    """Loading the model and waiting for the one row are no time of an episode."""
    path, load = tiny.model_dir(tmp_path), hf_engine.load_model
    monkeypatch.setattr(hf_engine, "load_model", lambda *spec: (time.sleep(1), load(*spec))[1])
    machine = engine(path, rows=1)
    began = time.monotonic()
    made = ask_all(machine, prompts(4), [40] * 4)
    spent = time.monotonic() - began - 1
    assert all(one.seconds > 0 for one in made) and sum(one.seconds for one in made) <= spent * 1.01
    machine.close()


def test_seed_decides_the_sample(tmp_path):
    """The same seed draws the same text in any company; another seed another text."""
    path = tiny.model_dir(tmp_path)
    prompt, others = prompts(1, seed=1)[0], prompts(5, seed=4)
    machine = engine(path, temperature=0.9, top_p=0.95)
    alone = machine.generate(prompt, limit=30, seed=7, episode="a")
    crowd = ask_all(machine, [prompt, *others], [30] * 6, names=list("bcdefg"), seed=7)
    again = machine.generate(prompt, limit=30, seed=8, episode="a")
    machine.close()
    assert crowd[0].ids == alone.ids
    assert again.ids != alone.ids


def test_sampling_follows_the_nucleus():
    """20,000 draws from four known tokens; each share within 6 standard deviations, so a false alarm has p < 1e-7."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    logits = probs.log().repeat(n, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    for temperature, top_p, expected in [
        (1.0, 1.0, probs),
        (1.0, 0.7, torch.tensor([0.625, 0.375, 0, 0])),  # 0.5 + 0.3 is the smallest set that reaches 0.7
        (0.5, 1.0, probs**2 / (probs**2).sum()),
        (1.0, 0.01, torch.tensor([1.0, 0, 0, 0])),
    ]:
        tokens, logprobs = hf_engine._sample(logits, temperature, top_p, generators)
        shares = torch.bincount(torch.tensor(tokens), minlength=4) / n
        width = 6 * (expected * (1 - expected) / n).sqrt()
        assert ((shares - expected).abs() <= width + 1e-9).all(), (temperature, top_p, shares)
        assert torch.allclose(torch.tensor(logprobs), probs.log()[torch.tensor(tokens)], atol=1e-5)


def test_a_wide_nucleus_is_not_cut_at_the_first_candidates():
    """300 equal tokens and top-p 0.9: the nucleus holds 270, far more than the 64 that are looked at first."""
    generators = [torch.Generator().manual_seed(i) for i in range(5000)]
    tokens, _ = hf_engine._sample(torch.zeros(5000, 300), 1.0, 0.9, generators)
    assert 255 < len(set(tokens)) <= 271


def test_logprob_is_the_mean_at_temperature_1(tmp_path):
    from transformers import AutoModelForCausalLM

    path = tiny.model_dir(tmp_path)
    prompt = prompts(1, seed=1)[0]
    machine = engine(path, temperature=0.7, top_p=0.9)
    made = machine.generate(prompt, limit=15, seed=3, episode="a")
    machine.close()
    assert not made.stopped
    logits = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([prompt + made.ids])).logits[0].log_softmax(-1)
    mean = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(made.ids)) / len(made.ids)
    assert made.logprob == pytest.approx(mean, abs=1e-4)


def test_stops_at_the_given_token_and_does_not_say_it(tmp_path):
    path = tiny.model_dir(tmp_path)
    prompt = prompts(1, seed=1)[0]
    free = reference(path, prompt, 20)
    end = free[7]
    machine = engine(path, stop=[end])
    made = machine.generate(prompt, limit=20, seed=0, episode="a")
    machine.close()
    first = free.index(end)
    assert (made.ids, made.stopped, made.tokens_out) == (free[:first], True, first + 1)


def adapter_dir(path: str, target, name: str | None = None, rank: int = 4) -> str:
    """A LoRA adapter on all linear layers whose weights are large enough to change the text."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    model.peft_config["default"].base_model_name_or_path = name or path
    model.save_pretrained(target)
    return str(target)


def test_adapter(tmp_path):
    """Merged weights answer as PEFT's own forward does, and differently from the base model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = tiny.model_dir(tmp_path)
    adapter = adapter_dir(path, tmp_path / "adapter")
    prompt = prompts(1, seed=1)[0]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), adapter).eval()
    out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    expected = out[0, len(prompt) :].tolist()
    machine = engine(path, adapter=adapter)
    made = machine.generate(prompt, limit=20, seed=0, episode="a")
    machine.close()
    assert whole(made, machine.stop, expected) == expected
    assert expected != reference(path, prompt, 20)


def test_adapter_of_another_model(tmp_path):
    """By its name at once; by its shapes, where the names say nothing, when it is loaded."""
    path, wider = tiny.model_dir(tmp_path), tiny.model_dir(tmp_path, hidden=128)
    named = adapter_dir(wider, tmp_path / "named")
    with pytest.raises(InputError, match="made for .*128.*, not for .*64"):
        models.check_adapter(named, path)
    disguised = adapter_dir(wider, tmp_path / "disguised", name=path)
    machine = engine(path, adapter=disguised)
    with pytest.raises(InputError, match="does not fit"):
        machine.generate([20, 21], limit=2, seed=0, episode="a")
    with pytest.raises(InputError, match="does not fit"):  # and everyone who asks later hears the same
        machine.generate([20, 21], limit=2, seed=0, episode="b")


def test_nf4(tmp_path):
    """On a CPU the expanded weights are exactly those that NF4 training computes with."""
    import bitsandbytes as bnb

    path = tiny.model_dir(tmp_path)
    plain, rounded = hf_engine.load_model(path), hf_engine.load_model(path, quant="nf4")
    one = plain.model.layers[0].mlp.up_proj.weight
    other = rounded.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(one, other.to(one))
    if other.device.type == "cpu":
        packed, state = bnb.functional.quantize_4bit(one.data, quant_type="nf4", compress_statistics=True)
        assert torch.equal(bnb.functional.dequantize_4bit(packed, state), other)


def test_closing_wakes_those_who_wait(tmp_path):
    path = tiny.model_dir(tmp_path)
    machine = engine(path, rows=1)
    machine.generate([20, 21], limit=1, seed=0, episode="load")
    answers: list = []
    thread = threading.Thread(target=lambda: answers.extend(ask_all(machine, prompts(3), [2000] * 3)))
    thread.start()
    while not any(row.request for row in machine.rows):
        pass
    machine.close()
    thread.join(timeout=10)
    assert any(isinstance(answer, InfraError) for answer in answers)
    with pytest.raises(InfraError):
        machine.generate([20, 21], limit=1, seed=0, episode="late")


def test_no_model_there(tmp_path):
    machine = engine(str(tmp_path))
    with pytest.raises(InputError, match="no model that transformers can load"):
        machine.generate([1], limit=1, seed=0, episode="a")
