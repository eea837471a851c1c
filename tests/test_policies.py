"""Who answers a state: specs, recorded turns, the engine behind hf:."""

import json

import pytest
import tiny

from common import policies
from common.errors import InputError

CHAT = [{"role": "system", "content": "Fix it."}, {"role": "user", "content": "total is wrong"}]
SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16}


def open_policy(spec: str, role: str = "student", **options):
    return policies.open_policy(spec, role=role, **(SAMPLING | options))


def act(policy, messages=CHAT, **at):
    return policy.act({"instance_id": at.pop("instance_id", "x")}, messages,
                      **({"seed": 1, "episode": "e", "turn": 0, "attempt": 0} | at))  # fmt: skip


# ---------------------------------------------------------------- specs

@pytest.mark.parametrize("spec", ["", "foo", "hf:", "openai:", "replay:", "oracle:", "oracel", "HF:x"])
def test_an_unknown_policy_lists_the_known_ones(spec):
    with pytest.raises(InputError, match="hf:MODEL.*openai:MODEL@URL.*oracle.*replay:FILE"):
        open_policy(spec)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("hf:/no/such/model", "no such directory"),
        ("hf:m,quant=int3", "neither nf4 nor none"),
        ("hf:m,adpater=x", "wanted hf:MODEL"),
        ("hf:m,adapter=x,adapter=y", "wanted hf:MODEL"),
        ("hf:m,adapter=/no/such", "adapter_config.json is missing"),
        ("openai:m", "wanted openai:MODEL@URL"),
        ("openai:m@localhost:8000", "wanted openai:MODEL@URL"),
        ("openai:@http://localhost:8000/v1", "wanted openai:MODEL@URL"),
    ],
)
def test_bad_specs(spec, words):
    with pytest.raises(InputError, match=words):
        open_policy(spec)


def test_sampling_out_of_range():
    for bad in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(InputError, match="--temperature"):
            open_policy("oracle", **bad)


# ---------------------------------------------------------------- replay:

def write(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"replay:{path}"


def test_replay_answers_by_turn_and_attempt(tmp_path):
    spec = write(tmp_path / "turns.jsonl", {"instance_id": "a", "turns": ["one", "two"]},
                 {"instance_id": "a", "attempt": 1, "turns": ["uno"]})  # fmt: skip
    policy = open_policy(spec)
    assert [act(policy, instance_id="a", turn=t).text for t in (1, 0)] == ["two", "one"]  # whoever acted before
    assert act(policy, instance_id="a", attempt=1).text == "uno"
    assert act(policy, instance_id="a", attempt=2).text == "one"
    with pytest.raises(InputError, match="a, attempt 0: asked for turn 2, but only 2"):
        act(policy, instance_id="a", turn=2)
    with pytest.raises(InputError, match="nothing recorded for b, attempt 0"):
        act(policy, instance_id="b")


def test_replay_of_a_trajectory(tmp_path):
    said = [{"role": "assistant", "content": "one", "finish_reason": "length"}, {"role": "user", "content": "exit 0"},
            {"role": "assistant", "content": "two", "finish_reason": "stop"}]  # fmt: skip
    spec = write(tmp_path / "trajectories.jsonl", {"instance_id": "a", "attempt": 0, "messages": CHAT + said})
    policy = open_policy(spec)
    first, second = (act(policy, instance_id="a", turn=t) for t in (0, 1))
    assert (first.text, first.finish_reason, second.text) == ("one", "length", "two")
    with pytest.raises(InputError, match="attempt 1"):
        act(policy, instance_id="a", attempt=1)


@pytest.mark.parametrize(
    "lines, words",
    [
        ("", "no recorded turns"),
        ('{"instance_id": "a", "turns": "one"}\n', ":1: a: needs `turns`"),
        ('{"instance_id": "a"}\n', ":1: a: needs `turns`"),
        ('{"turns": ["one"]}\n', ":1: needs an instance_id"),
        ('{"instance_id": "a", "messages": 3}\n', ":1: a: `messages` must be a list of objects"),
        ('{"instance_id": "a", "messages": [{"role": "assistant"}]}\n', ":1: a: `messages` must be a list of objects"),
        ('{"instance_id": "a", "turns": []}\n{"instance_id"', ":2: not a JSON object"),
        ('{"instance_id": "a", "turns": []}\n' * 2, ":2: a, attempt None, is there twice"),
    ],
)
def test_replay_of_a_bad_file(tmp_path, lines, words):
    path = tmp_path / "turns.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=words):
        open_policy(f"replay:{path}")


# ---------------------------------------------------------------- hf:

@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3", "tools"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_hf_answers_as_plain_transformers_does(tmp_path, arch, template):
    """Three turns with kept keys, greedy: the text of generate() on the prompt that the template itself renders."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny.model_dir(tmp_path, arch, template)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    policy = open_policy(f"hf:{path}", max_context=1000, batch=2)
    chat = list(CHAT)
    for turn in range(3):
        answer = act(policy, chat, turn=turn)
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        new = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True)
        assert (answer.tokens_in, answer.tokens_out) == (len(ids), len(new))
        ended = new[-1] in model.generation_config.eos_token_id
        assert answer.finish_reason == ("stop" if ended else "length")
        assert (answer.tokens_cached > 0) == (turn > 0)
        chat += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": f"exit {turn}\nls"}]
    policy.forget("e")
    assert act(policy, chat).tokens_cached == 0
    policy.close()


def test_hf_stops_where_the_template_ends_a_turn(tmp_path):
    """The template's end-of-turn token stops the answer even where the generation config does not name it."""
    path = tiny.model_dir(tmp_path, template="tools")
    config = tmp_path / path / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": 0}))
    policy = open_policy(f"hf:{path}")
    act(policy)
    assert policy.engine.stop == {0, policy.tokenizer.convert_tokens_to_ids("<|end|>")}
    policy.close()


def test_hf_respects_the_context(tmp_path):
    path = tiny.model_dir(tmp_path)
    n = act(open_policy(f"hf:{path}")).tokens_in
    roomy, tight, full = (open_policy(f"hf:{path}", max_context=n + more) for more in (5, 1, 0))
    assert act(roomy).tokens_out <= 5
    answer = act(tight)
    assert (answer.tokens_out, answer.finish_reason) == (1, "length")
    with pytest.raises(policies.ContextLimit):
        act(full)
    with pytest.raises(policies.ContextLimit):  # the model itself was made for 4096
        act(open_policy(f"hf:{path}", max_context=10**6), [{"role": "user", "content": "x 1 " * 4000}])


def test_hf_describes_itself_without_loading(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/tiny"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    policy = open_policy(f"hf:org/tiny,adapter={adapter},quant=nf4")
    one = policy.describe()
    assert {k: v for k, v in one.items() if k != "adapter_hash"} == {
        "model": "hf:org/tiny", "adapter": str(adapter), "quantisation": "nf4", "sampling": SAMPLING, "extra": {},
    }  # fmt: skip
    (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    assert open_policy(f"hf:org/tiny,adapter={adapter},quant=nf4").describe()["adapter_hash"] != one["adapter_hash"]
    assert open_policy(f"hf:org/tiny,adapter={adapter}").quant == "none"
    (adapter / "manifest.json").write_text('{"summary": {"quant": "nf4"}}')  # what 03_train.py leaves there
    assert open_policy(f"hf:org/tiny,adapter={adapter}").describe()["quantisation"] == "nf4"
    assert open_policy(f"hf:org/tiny,adapter={adapter},quant=none").quant == "none"
    with pytest.raises(InputError, match="made for elsewhere/tiny, not for org/other"):
        open_policy(f"hf:org/other,adapter={adapter}")


def test_hf_passes_template_arguments(tmp_path):
    """enable_thinking = false puts Qwen3's empty think block into the prompt."""
    path = tiny.model_dir(tmp_path, "qwen3", "qwen3")
    plain = act(open_policy(f"hf:{path}"))
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    quiet = open_policy(f"hf:{path}", extra=extra)
    assert act(quiet).tokens_in > plain.tokens_in
    assert quiet.describe()["extra"] == extra
    with pytest.raises(InputError, match="chat_template_kwargs, not top_k"):
        open_policy(f"hf:{path}", extra={"top_k": 3})


def test_counting(tmp_path):
    assert open_policy(f"hf:{tiny.model_dir(tmp_path)}").count("def total(items):") > 1
    assert open_policy("oracle").count("def") is None
