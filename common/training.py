"""The model side of training: load the base (plain or NF4), put LoRA on it, run packed rows.

On the prefix tree a row may see its ancestors only. On CUDA that is a FlexAttention block mask made from the vector
`end`, on CPU (where flex has no backward) a dense mask through SDPA's own kernel, which is told besides that no row
looks ahead: half of the work. Never `eager` with a bool mask: it would add it. Never attention_mask=None with positions
that start again: transformers reads that as packed documents. `probe` tries on the loaded model that branches really do
not see each other.
"""

import contextlib
import gc
import os
import resource
import sys
from typing import Any

import numpy as np

from common import linears, models, prefix_tree
from common.errors import InputError

FLEX_BLOCK = 128
DENSE_ATTENTION = 1.5  # how much longer a FLOP of attention takes than one of a linear layer, on CPU


class Processes:
    """The processes that train together, as torchrun starts them (RANK, WORLD_SIZE, LOCAL_RANK), or the only one.

    Each holds the whole model and the same data and adds up the gradient of its share of every step's micro-batches.
    Weights are those of the whole step, so that gradients are summed, not averaged.
    """

    def __init__(self):
        import torch

        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if self.size > 1:
            torch.distributed.init_process_group("nccl" if cuda else "gloo")

    def agree(self, word: bool) -> bool:
        """What the first process says; the others wait for it."""
        return bool(self.total([float(word) if self.first else 0.0])[0])

    def share(self, batches: list, attention: float, loads: list[float] | None = None) -> list:
        """This process's micro-batches: the heaviest first, each to the process that has least to do so far.

        loads: what each process has to do already; what these batches add is added.
        """
        loads, mine = [0.0] * self.size if loads is None else loads, []
        for batch in sorted(batches, key=lambda batch: -batch.n_rows):
            least = loads.index(min(loads))
            loads[least] += batch.n_rows + attention * batch.ids.shape[0] * batch.ids.shape[1] ** 2
            if least == self.rank:
                mine.append(batch)
        return mine

    def total(self, values: list[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return values
        import torch

        sums = torch.tensor(values, dtype=torch.float64, device=models.device_name())
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def add_gradients(self, parameters: list) -> None:
        """Put the sum over the processes into every parameter's grad. A process without rows adds nothing."""
        if self.size == 1:
            return
        import torch

        mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in mine])
        torch.distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)

    def close(self) -> None:
        if self.size > 1:
            import torch

            torch.distributed.destroy_process_group()


def load_base(model: str, quant: str, tree: bool) -> Any:
    """The frozen base model in training mode, without dropout. quant: nf4 or none; fp32 on CPU, bf16 on CUDA."""
    import torch

    attention = "flex_attention" if tree and models.device_name() == "cuda" else "sdpa"
    if attention == "flex_attention":  # beyond its limit of compilations it would fall back, unsaid, to all scores at once
        torch._dynamo.config.recompile_limit = 32
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    base = models.load_base(model, quant, attn_implementation=attention)
    base.config.use_cache = False
    if tree and attention == "sdpa" and base._supports_attention_backend:
        from transformers import AttentionInterface

        AttentionInterface.register("swe_dagger_tree", _attend)
        base.set_attn_implementation("swe_dagger_tree")
    for module in base.modules():  # dropout would make two passes over one sample differ, and flex has none
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    # Training mode from the start: one forward pass in eval mode and bitsandbytes repacks NF4 weights on CPU for a
    # kernel that has no gradient, so that what is trained afterwards is silently wrong.
    return base.requires_grad_(False).train()


def _attend(module, query, key, value, attention_mask, scaling=None, **rest):
    """transformers' attention interface on a CPU. query (1, H, L, D), key and value (1, K, L, D) -> (1, L, H, D), None.

    The public function takes a mask or is_causal, the operator below it takes both and skips what lies ahead.
    """
    import torch

    if rest.get("softcap") or rest.get("s_aux") is not None:
        raise InputError("this model's attention has soft caps or sinks, which 03_train does not know how to do; take "
                         "another model")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if kernel and query.shape == value.shape:
        seen = kernel(query, key, value, 0.0, True, attn_mask=attention_mask, scale=scaling)[0]
    else:
        seen = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=attention_mask is None, scale=scaling)  # fmt: skip
    return seen.transpose(1, 2), None


def add_lora(base: Any, model: str, init_adapter: str | None, rank: int, alpha: int, seed: int) -> Any:
    """The base with LoRA on all linear layers: fresh, or going on from `init_adapter` (InputError if it does not fit)."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    if init_adapter is None:
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=_linear_layers(base), task_type="CAUSAL_LM"
        )
        peft_model = get_peft_model(base, config)
    else:
        peft_model = models.load_adapter(base, model, init_adapter, trainable=True)
        had = peft_model.peft_config["default"]
        if (had.r, had.lora_alpha) != (rank, alpha):
            raise InputError(f"{init_adapter} has rank {had.r} and alpha {had.lora_alpha}, and goes on so: give --lora-rank "
                             f"{had.r} --lora-alpha {had.lora_alpha}")  # fmt: skip
    # As given on the command line, so that an adapter says the same on every machine.
    peft_model.peft_config["default"].base_model_name_or_path = model
    linears.pack_linears(getattr(base, base.base_model_prefix), backward=True)
    return peft_model


def _linear_layers(base: Any) -> list[str]:
    """Names of all linear layers but the output head: q_proj, up_proj, ... ("all-linear" would list every layer)."""
    import torch

    transformer = getattr(base, base.base_model_prefix)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    if any(parameter.dim() > 2 for parameter in transformer.parameters()):
        print("this model has weights that are no linear layers (experts of a mixture): LoRA leaves them as they are",
              file=sys.stderr)  # fmt: skip
    return sorted({name.rpartition(".")[2] for name in linear})


def checkpointing(peft_model: Any, how: str) -> None:
    """Gradient checkpointing: none, on, or offload (checkpoints wait in host memory). Switches to training mode."""
    peft_model.train()
    if how == "none":
        return
    # Only the reentrant kind keeps its inputs as saved tensors, which is what save_on_cpu can move; it needs an input
    # that requires a gradient.
    reentrant = how == "offload"
    peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        peft_model.enable_input_require_grads()


def hidden_rows(base: Any, batch: prefix_tree.Batch, offload: bool = False) -> Any:
    """(P, H): the last hidden states of the rows that predict, through the transformer without its head."""
    import torch

    device = base.device
    transformer = getattr(base, base.base_model_prefix)
    on_cpu = torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda") if offload else contextlib.nullcontext()
    if rows_computed(base, batch) > batch.n_rows:
        batch = prefix_tree.pad_rows(batch, rows_computed(base, batch))
    inputs = {"input_ids": torch.from_numpy(batch.ids).to(device)}
    if batch.end is not None:
        inputs["position_ids"] = torch.from_numpy(batch.depth).to(device)
        inputs["attention_mask"] = _tree_mask(base, torch.from_numpy(batch.end[0]).to(device))
    # One sample per line needs no mask: no row looks ahead, and padding stands behind.
    with autocast(device), on_cpu:
        hidden = transformer(**inputs, use_cache=False).last_hidden_state  # (B, L, H)
    return hidden.flatten(0, 1)[torch.from_numpy(batch.rows).to(device)]


def autocast(device: Any) -> Any:
    """bf16 compute on CUDA (LoRA weights stay fp32), plain fp32 on CPU, where bf16 is slower."""
    import torch

    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def rows_computed(base: Any, batch: prefix_tree.Batch) -> int:
    """The rows that the model is given for a batch, padding included: with flex a tree is padded to whole blocks."""
    if batch.end is None or base.config._attn_implementation != "flex_attention":
        return batch.n_rows
    return -(-batch.n_rows // FLEX_BLOCK) * FLEX_BLOCK


def _tree_mask(base: Any, end: Any) -> Any:
    """Row q sees row k iff k <= q < end[k]. A BlockMask for flex, else (1, 1, L, L): bool, or 0 and -inf."""
    import torch

    length = end.shape[0]
    if base.config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(_batch, _head, q, k):
            return (k <= q) & (q < end[k])

        return create_block_mask(sees, None, None, length, length, device=end.device, _compile=True)
    row = torch.arange(length, device=end.device)
    seen = ((row[None, :] <= row[:, None]) & (row[:, None] < end[None, :]))[None, None]
    if base.config._attn_implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def attention_cost(base: Any) -> float:
    """What one more row to look at costs a row, in rows, where the mask is dense; 0 where flex skips empty blocks.

    A row takes 2 FLOPs per weight of the linear layers, and 4 per layer, row looked at and width of the queries.
    """
    import torch

    if base.config._attn_implementation == "flex_attention":
        return 0.0
    transformer = getattr(base, base.base_model_prefix)
    linear = [module for module in transformer.modules() if isinstance(module, torch.nn.Linear) or hasattr(module, "packed")]
    config = base.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    looked_at = 2 * config.num_hidden_layers * config.num_attention_heads * width
    return DENSE_ATTENTION * looked_at / sum(module.in_features * module.out_features for module in linear)


def probe(base: Any, tree: bool, longest: int) -> None:
    """Raises InputError where this model cannot be trained as we do it: tried out on a few tokens, not looked up.

    Two questions: are the logits the head applied to the last hidden state, and (on the tree) does a branch give what
    it gives alone? Positions counted by row fail the second. Recurrent state may leak too little to be seen here, so
    layers that carry one are looked for by name as well.
    """
    import torch

    text = base.config.get_text_config()
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):  # torch's attention passes over the first, unsaid
        if getattr(text, name, None):
            raise InputError(f"the {base.config.model_type} architecture has {name}, which 03_train does not know how to do; "
                             "take another model")  # fmt: skip
    reach = models.fixed_positions(base.config)
    if reach and longest > reach:
        raise InputError(
            f"this model turns to other rotary factors beyond {reach} tokens, by the longest sample of a batch, and a "
            f"sample has {longest}: take --max-context {reach}"
        )
    rng = np.random.default_rng(0)
    words = rng.choice(base.config.get_text_config().vocab_size, size=24, replace=False).astype(np.int32)
    alone = prefix_tree.Sample("probe", np.concatenate([words[:6], words[16:]]), 6)
    other = prefix_tree.Sample("probe", words[:16], 6)
    tolerance = 1e-4 if base.dtype == torch.float32 else 0.1
    with torch.no_grad(), autocast(base.device):
        line = prefix_tree.pack_per_turn([alone], [1.0], 64)[0]
        expected = hidden_rows(base, line).float()
        ours = base.get_output_embeddings()(expected.to(base.dtype)).float()
        inputs = torch.from_numpy(line.ids).to(base.device)
        mask = torch.ones_like(inputs)
        theirs = base(input_ids=inputs, attention_mask=mask).logits[0, line.rows].float()
        if _distance(ours, theirs) > tolerance:
            raise InputError(
                f"the {base.config.model_type} architecture changes its logits after the output layer, which 03_train "
                "does not know how to do; take another model"
            )
        if not tree:
            return
        window = _window(base.config)
        if window and window < longest:
            raise InputError(
                f"this model has sliding-window attention over {window} tokens and a sample has {longest}: the prefix "
                "tree does not count such windows; take --packing per-turn, or a --max-context within the window"
            )
        isolated = not _carries_state(base)
        if isolated:
            both = prefix_tree.pack_tree([other, alone], [0.0, 1.0], 64)[0]
            try:
                found = hidden_rows(base, both).float()[torch.from_numpy(np.flatnonzero(both.weights))]
                isolated = _distance(found, expected) <= tolerance
            except (TypeError, ValueError, AttributeError):  # takes no positions, or no mask of this kind
                isolated = False
        if not isolated:
            raise InputError(
                f"the {base.config.model_type} architecture mixes the branches of a prefix tree (recurrent state, or "
                "positions counted by row): take --packing per-turn"
            )


def _carries_state(base: Any) -> bool:
    """Whether a layer hands something from row to row other than by attention."""
    kinds = getattr(base.config.get_text_config(), "layer_types", None) or []
    if any(not kind.endswith("attention") or kind == "linear_attention" for kind in kinds):
        return True
    names = " ".join(type(module).__name__.lower() for module in base.modules())
    return any(word in names for word in ("conv1d", "mamba", "rwkv", "recurrent", "delta", "lstm", "shortconv"))


def _distance(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


def _window(config: Any) -> int | None:
    text = config.get_text_config()
    if any("full" not in kind for kind in getattr(text, "layer_types", None) or []):
        return getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    if getattr(text, "layer_types", None) or getattr(text, "use_sliding_window", True) is False:
        return None
    return getattr(text, "sliding_window", None)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out. An "illegal memory access" is something else, and so is a kernel without a configuration."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(
        name in str(error) for name in ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator"))  # fmt: skip


def room_for_plain(parameters: int) -> bool:
    """Whether a plain base of that many weights fits into a CPU's memory, once what nobody uses any more is freed.

    A GPU may be tried: it raises OutOfMemoryError where a CPU's memory, overdrawn, takes the process with it.
    """
    import psutil
    import torch

    gc.collect()  # models have reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return True
    return 8 * parameters < psutil.virtual_memory().available  # fp32, and its transpose for gradients (linears.py)


def peak_memory_mb() -> float:
    """The most memory used so far: of the GPU on CUDA, of this process on CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
