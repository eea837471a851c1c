"""One optimiser step's forward and backward for the same labels: prefix tree against one sample per line.

    .venv/bin/python tests/bench/packing.py                                  SmolLM2-135M at 4, 12 and 30 turns
    .venv/bin/python tests/bench/packing.py --turns 5 --quant none nf4       the laptop's trajectories; is NF4 quicker?
    .venv/bin/python tests/bench/packing.py --shape qwen3-4b --quant nf4 --turns 30 50 --context 32768 65536 \\
        --trajectories 1 --tokens-per-batch 65536 --checkpointing on         a GPU, weights at random

Both packings run alternately in one process. "gain" is the share of the theoretical ratio (rows per-turn : tree) that
becomes time. On a GPU the table has the peak memory of each and the achieved share of the chip's bf16 ceiling (measured
with one large matrix product), and the first line compares the gradients of both packings.
"""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import prefix_tree, training  # noqa: E402

train = importlib.import_module("03_train")


def trajectory(turns: int, context: int | None, rng: np.random.Generator, vocabulary: int) -> list:
    """The samples of one trajectory of random tokens; every second label is what was executed.

    `context` tokens in all, or an opening of 60 tokens, then 22 of action and 18 of observation a turn.
    """
    draw = lambda n: rng.integers(0, vocabulary, n)  # noqa: E731
    opening, action, observation = 60, 22, 18
    if context:
        action = min(150, context // turns // 2)
        observation = (context - 1000) // turns - action
        opening = context - turns * (action + observation)
    state, samples = draw(opening), []
    for turn in range(turns):
        executed = draw(action)
        label = executed if turn % 2 == 0 else draw(action)
        samples.append(prefix_tree.Sample(f"turn {turn}", np.concatenate([state, label]).astype(np.int32), len(state)))
        state = np.concatenate([state, executed, draw(observation)])
    return samples


def model_directory(shape: str, home: str) -> str:
    """A model of that shape with random weights, made on the spot."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=262144,
                         rope_parameters={"rope_type": "default", "rope_theta": 5e6}, tie_word_embeddings=True)
    assert shape == "qwen3-4b"
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(home)
    return home


def ceiling() -> float:
    """bf16 FLOP/s of one large matrix product on this GPU."""
    import torch

    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    for rounds in (3, 30):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(rounds):
            a @ a
        torch.cuda.synchronize()
    return 30 * 2 * 8192**3 / (time.perf_counter() - began)


def gradient(model, base, batches: list, offload: bool):
    import torch

    model.zero_grad()
    for batch in batches:
        train.accumulate(base, batch, offload=offload)
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=["qwen3-4b"], help="random weights instead of --model")
    parser.add_argument("--turns", type=int, nargs="+", default=[4, 12, 30])
    parser.add_argument("--context", type=int, nargs="+", default=[None], help="tokens of a trajectory")
    parser.add_argument("--trajectories", type=int, default=4)
    parser.add_argument("--quant", nargs="+", default=["none"])
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--checkpointing", default="none", choices=["none", "on", "offload"])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    import torch

    cuda = torch.cuda.is_available()
    home = tempfile.TemporaryDirectory()
    name = model_directory(args.shape, home.name) if args.shape else args.model
    offload = args.checkpointing == "offload"
    peak = ceiling() if cuda else None
    print("| turns | context | base | packing | rows | rows : distinct | s | tokens/s | per-turn : tree, rows | time | gain |"
          + (" peak MB | of bf16 ceiling |" if cuda else ""))
    print("|" + "---|" * (13 if cuda else 11))
    for quant in args.quant:
        base = training.load_base(name, quant, tree=True)
        model = training.add_lora(base, name, None, 16, 32, seed=0)
        training.checkpointing(model, args.checkpointing)
        base, attention = model.get_base_model(), training.attention_cost(model.get_base_model())
        if quant == args.quant[0]:  # LoRA starts with B = 0: without this half of the gradients are
            with torch.no_grad():
                for label, parameter in model.named_parameters():
                    if "lora_B" in label:
                        parameter.normal_(0, 0.01)
        weights_in_layers = sum(p.numel() for p in getattr(base, base.base_model_prefix).layers.parameters())
        for context in args.context:
            for turns in args.turns:
                measure(args, model, base, attention, turns, context, quant, offload, peak, weights_in_layers)


def measure(args, model, base, attention, turns, context, quant, offload, peak, weights_in_layers) -> None:
    import torch

    cuda = torch.cuda.is_available()
    rng = np.random.default_rng(0)
    samples = [s for _ in range(args.trajectories) for s in trajectory(turns, context, rng, base.config.vocab_size)]
    distinct = prefix_tree.distinct_tokens(samples)
    weights = train.token_weights(samples, "token")
    layouts = {"tree": prefix_tree.pack_tree(samples, weights, args.tokens_per_batch, attention),
               "per-turn": prefix_tree.pack_per_turn(samples, weights, args.tokens_per_batch)}
    gradients, seconds, memory = {}, {key: [] for key in layouts}, {}
    for round_number in range(args.rounds + 1):  # the first one warms up
        for packing, batches in layouts.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            gradients[packing] = gradient(model, base, batches, offload)
            if cuda:
                torch.cuda.synchronize()
                memory[packing] = torch.cuda.max_memory_allocated() / 2**20
            if round_number:
                seconds[packing].append(time.perf_counter() - began)
    apart = float((gradients["tree"] - gradients["per-turn"]).norm() / gradients["per-turn"].norm())
    print(f"gradients of the two packings differ by {apart:.1e}", file=sys.stderr)
    rows = {packing: sum(batch.n_rows for batch in batches) for packing, batches in layouts.items()}
    best = {packing: min(times) for packing, times in seconds.items()}
    in_theory, found = rows["per-turn"] / rows["tree"], best["per-turn"] / best["tree"]
    for packing in layouts:
        line = (f"| {turns} | {context or distinct // args.trajectories} | {quant} | {packing} | {rows[packing]} "
                f"| {rows[packing] / distinct:.2f} | {best[packing]:.2f} | {rows[packing] / best[packing]:.0f} |")
        line += f" {in_theory:.2f} | {found:.2f} | {found / in_theory:.0%} |" if packing == "tree" else " | | |"
        if cuda:
            # forward and backward through frozen layers: 4 FLOP a weight and row, 6 with checkpoints computed again
            flop = (4 if args.checkpointing == "none" else 6) * weights_in_layers * rows[packing]
            line += f" {memory[packing]:.0f} | {flop / best[packing] / peak:.0%} |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
