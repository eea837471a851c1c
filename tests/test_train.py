"""Training: which labels at which state, and the same loss and gradient for both packings.

Models are tiny and random, but everything else is real: templates, tokenizers, LoRA.
"""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import chat, models, prefix_tree, run, training, training_data
from common.errors import InputError
from common.prefix_tree import Sample
from tests import tiny
from tests.records import iteration, label, tokenised, trajectory, write

train = importlib.import_module("03_train")


# ---------------------------------------------------------------- data


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
    assert training_data.read_labels([directory])[1] == {"enable_thinking": False}
    tokenizer = tiny.tokenizer("qwen3")
    sample = tokenised([directory], tokenizer)[0][0][0]
    assert tokenizer.decode(sample.ids[: sample.n_prompt]).endswith("<think>\n\n</think>\n\n")
    other = iteration(tmp_path / "b", kwargs={"enable_thinking": True})
    with pytest.raises(InputError, match="different chat template arguments"):
        training_data.read_labels([directory, other])


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


def test_steps_per_epoch_share_out_the_trajectories():
    for n, steps in ((10, 4), (67, 44), (5, 5), (7, 1)):
        made = train.plan(n, 99, 2, None, seed=1, steps_per_epoch=steps)
        assert [epoch for epoch, _ in made] == [1] * steps + [2] * steps
        sizes = [len(chosen) for _, chosen in made]
        assert max(sizes) - min(sizes) <= 1
        assert sorted(i for epoch, chosen in made if epoch == 2 for i in chosen) == list(range(n))


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
    with pytest.raises(InputError, match="soft caps or sinks"):
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
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, logits_scaling=8.0, attn_implementation="sdpa")
    with pytest.raises(InputError, match="granite .*changes its logits"):
        training.probe(GraniteForCausalLM(config), False, 50)


@pytest.mark.parametrize("name", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_soft_caps_are_refused_by_name(name):
    """torch's own attention leaves them away, and small logits hide a final cap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16,
                          num_attention_heads=2, num_key_value_heads=1, attn_implementation="sdpa",
                          **{"final_logit_softcapping": None, "attn_logit_softcapping": None} | {name: 1000.0})
    with pytest.raises(InputError, match=f"gemma2 architecture has {name}"):
        training.probe(Gemma2ForCausalLM(config), False, 50)


def test_dropout_of_the_base_is_off(tmp_path):
    """Two passes over one sample have to agree, and a prefix tree with them."""
    path = Path(tiny.model_dir(tmp_path, "llama", "chatml"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    for tree in (True, False):
        base = training.load_base(str(path), "none", tree)
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


def test_what_is_out_of_memory():
    """A fault of the GPU was once taken for it, since its message has the word memory."""
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 50, dtype=torch.float64)
    assert training.out_of_memory(full.value) and training.out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not training.out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
