"""Peak memory of one training step on a CPU: both packings, and how it grows with the vocabulary.

    .venv/bin/python tests/bench/memory.py

Every line is a process of its own with a random model (8 layers, 256 wide) and one trajectory of 30 turns, 2,000 tokens.
"all logits" is what the logits of every row would take, in fp32 and once; we hold those of a chunk of label rows.
"""

import importlib
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(packing: str, vocabulary: int) -> None:
    from packing import trajectory
    from transformers import LlamaConfig, LlamaForCausalLM

    from common import prefix_tree, training

    train = importlib.import_module("03_train")
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=8,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as home:
        LlamaForCausalLM(config).save_pretrained(home)
        base = training.load_base(home, "none", tree=True)
        model = training.add_lora(base, home, None, 16, 32, seed=0)
    training.checkpointing(model, "none")
    base = model.get_base_model()
    samples = trajectory(30, 2000, np.random.default_rng(0), vocabulary)
    weights, limit = train.token_weights(samples, "token"), 4096
    tree = packing == "tree"
    batches = prefix_tree.pack_tree(samples, weights, limit, 0.0) if tree else prefix_tree.pack_per_turn(samples, weights, limit)
    before = memory_mb()
    for batch in batches:
        train.accumulate(base, batch)
    print(sum(batch.n_rows for batch in batches), max(batch.n_rows for batch in batches), before, memory_mb())


def main() -> None:
    print("| vocabulary | packing | rows | rows at once | MB before the step | MB more in it | all logits MB |")
    print("|---|---|---|---|---|---|---|")
    for vocabulary in (8192, 32768, 131072):
        for packing in ("tree", "per-turn"):
            done = subprocess.run([sys.executable, __file__, packing, str(vocabulary)], capture_output=True, text=True,
                                  check=True)
            rows, at_once, before, peak = map(float, done.stdout.split())
            print(f"| {vocabulary} | {packing} | {rows:.0f} | {at_once:.0f} | {before:.0f} | {peak - before:.0f} "
                  f"| {at_once * vocabulary * 4 / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
