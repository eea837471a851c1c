"""The same labels trained by us (tree, per-turn) and by TRL's SFTTrainer (padded, packed): seconds, and the first loss.

    python3.11 -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 trl==1.16.0 peft==0.21.2
    .venv/bin/python tests/bench/peer_trl.py --peer /tmp/trl/bin/python --data runs/laptop/iter_001

Every trainer gets the same token ids and masks in the same order, the same base model, LoRA of the same rank on the same
layers, AdamW, fp32 on a CPU, and one optimiser step for every --step labels (each trajectory's labels are adjacent).
TRL's `packed` is its best-fit-decreasing packing without padding; where samples go then differs, so its first loss is
that of other samples. Seconds are those of the training loop; loading is left out.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RANK, ALPHA, RATE = 16, 32, 1e-4


def ours(samples: list, step: int, packing: str, model_name: str, layers: bool = False) -> dict:
    import torch

    from common import prefix_tree, training

    train = importlib.import_module("03_train")
    base = training.load_base(model_name, "none", tree=packing == "tree")
    if layers:
        return {"layers": training._linear_layers(base)}
    model = training.add_lora(base, model_name, None, RANK, ALPHA, seed=0)
    training.checkpointing(model, "none")
    base = model.get_base_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0), []
    began, rows = time.perf_counter(), 0
    for start in range(0, len(samples), step):
        part = samples[start : start + step]
        weights = train.token_weights(part, "token")
        if packing == "tree":
            batches = prefix_tree.pack_tree(part, weights, 2048, training.attention_cost(base))
        else:
            batches = prefix_tree.pack_per_turn(part, weights, 2048)
        nll = sum(train.accumulate(base, batch) for batch in batches)
        rows += sum(batch.n_rows for batch in batches)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(nll / sum(sample.n_label for sample in part))
    return {"seconds": time.perf_counter() - began, "loss": losses[0], "rows": rows}


def theirs(job: dict) -> dict:
    """Runs in TRL's environment."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": ids, "completion_mask": [0] * n + [1] * (len(ids) - n)} for ids, n in job["samples"]]
    packed = job["packing"]
    with tempfile.TemporaryDirectory() as home:
        settings = SFTConfig(
            output_dir=home, per_device_train_batch_size=1 if packed else job["at_once"], max_length=2048,
            gradient_accumulation_steps=1 if packed else job["step"] // job["at_once"], num_train_epochs=1,
            learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
            packing=packed, completion_only_loss=True, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            gradient_checkpointing=False, train_sampling_strategy="sequential", disable_tqdm=True)
        model = AutoModelForCausalLM.from_pretrained(job["model"], attn_implementation="sdpa", dtype="float32")
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=job["layers"], task_type="CAUSAL_LM"))
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "loss": next(line["loss"] for line in trainer.state.log_history if "loss" in line)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="the interpreter of an environment with trl")
    parser.add_argument("--data", required=True, help="an iteration directory")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--labels", type=int, default=96)
    parser.add_argument("--step", type=int, default=24, help="labels in an optimiser step")
    parser.add_argument("--at-once", type=int, default=8, help="samples in one padded forward pass of TRL")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from common import embedded, training_data

    data, _ = training_data.prepare([args.data], "all", args.model, 2048, say=True)
    samples = [sample for one in data for sample in one.samples.samples()][: args.labels]
    tokens = sum(sample.n_label for sample in samples)
    job = {"samples": [(sample.ids.tolist(), sample.n_prompt) for sample in samples], "step": args.step,
           "at_once": args.at_once, "model": embedded.model_path(args.model)}
    job |= ours(samples, args.step, "tree", args.model, layers=True)
    print(f"{len(samples)} labels, {tokens} label tokens, {sum(len(s.ids) for s in samples)} tokens with their prompts\n")
    print("| trainer | packing | s | label tokens/s | loss of the first step | time : tree |")
    print("|---|---|---|---|---|---|")
    best = None
    for who, packing in (("ours", "tree"), ("ours", "per-turn"), ("TRL", "padded"), ("TRL", "packed")):
        if who == "ours":
            found = ours(samples, args.step, packing, args.model)
        else:
            text = json.dumps(job | {"packing": packing == "packed"})
            done = subprocess.run([args.peer, __file__, "--child"], input=text, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            found = json.loads(done.stdout.strip().splitlines()[-1])
        best = best or found["seconds"]
        print(f"| {who} | {packing} | {found['seconds']:.1f} | {tokens / found['seconds']:.1f} | {found['loss']:.5f} "
              f"| {found['seconds'] / best:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        print(json.dumps(theirs(json.load(sys.stdin))))
    else:
        main()
