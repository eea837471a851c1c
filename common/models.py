"""Base models, tokenizers and adapters from disk or hub, for acting (hf_engine.py) and for training (training.py)."""

import json
from pathlib import Path
from typing import Any

from common.embedded import model_path
from common.errors import InputError


def device_name() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(model: str) -> tuple[Any, int | None]:
    """(tokenizer, the most tokens that the model can take here) of a directory or hub id; InputError without one."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model_path(model))
        tokenizer = AutoTokenizer.from_pretrained(model_path(model))
    except (OSError, ValueError) as error:
        raise InputError(_not_loaded(model, error)) from None
    limits = (getattr(config.get_text_config(), "max_position_embeddings", None), fixed_positions(config))
    return tokenizer, min(filter(None, limits), default=None)


def fixed_positions(config: Any) -> int | None:
    """How far a model's rotary factors are fixed; None without a limit.

    With rope_type `dynamic` and `longrope` transformers takes other factors for a whole batch as soon as one sequence in
    it is longer: a short one beside it would then be computed otherwise than alone.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(inner for inner in rope.values() if isinstance(inner, dict))]  # some models have them by layer type
    if not any((kind.get("rope_type") or kind.get("type")) in ("dynamic", "longrope") for kind in kinds):
        return None
    reach = next((kind["original_max_position_embeddings"] for kind in kinds if "original_max_position_embeddings" in kind), None)
    return reach or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings


def load_base(model: str, quant: str, **options: Any) -> Any:
    """The causal language model, fp32 on CPU and bf16 on CUDA. quant: nf4 (double quantisation, as QLoRA) or none.

    `options` go to transformers, dtype and device_map among them. Raises InputError where there is no model that it can load.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    cuda = device_name() == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if quant == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    options = {"dtype": dtype, "device_map": {"": torch.cuda.current_device() if cuda else "cpu"}} | options
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(model_path(model), **options)
    except (OSError, ValueError) as error:
        raise InputError(_not_loaded(model, error)) from None


def check_adapter(adapter: str, base: str) -> None:
    """InputError unless `adapter` is a directory with a PEFT adapter made for the model `base`. Loads nothing."""
    config = Path(adapter) / "adapter_config.json"
    if not config.is_file():
        raise InputError(f"{adapter}: no adapter there (adapter_config.json is missing); 03_train.py --out makes one")
    try:
        made_for = json.loads(config.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config}: not valid JSON ({error})") from None
    # Only the last part of the name: a model directory may lie elsewhere on the machine that trained it.
    if made_for and Path(made_for.rstrip("/")).name != Path(base.rstrip("/")).name:
        raise InputError(f"{adapter}: the adapter was made for {made_for}, not for {base}; give it its own base model")


def load_adapter(base: Any, model: str, adapter: str, trainable: bool = False) -> Any:
    """`base` (of the name `model`) with the adapter on it, as a PeftModel; InputError where it does not fit."""
    from peft import PeftModel

    check_adapter(adapter, model)
    try:
        # Read on the CPU: PEFT's default is the first GPU, whichever one this process has.
        return PeftModel.from_pretrained(base, adapter, is_trainable=trainable, torch_device="cpu")
    except (RuntimeError, ValueError, OSError) as error:  # shapes or module names of another architecture
        raise InputError(f"{adapter}: the adapter does not fit {model} ({_line(error)}); give it the model that it was "
                         "trained on") from None


def trained_on(adapter: str | None) -> str:
    """nf4 or none: the quantisation of the base that 03_train.py trained `adapter` on, as its manifest says, or that of
    common/export.py, which lies beside the directory."""
    for manifest in (Path(adapter) / "manifest.json", Path(f"{adapter.rstrip('/')}.manifest.json")) if adapter else ():
        try:
            return json.loads(manifest.read_text())["summary"]["quant"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "none"  # an adapter from elsewhere: quant= says it


def _not_loaded(model: str, error: Exception) -> str:
    if Path(model).is_dir():
        return f"{model}: no model that transformers can load ({_line(error)})"
    return f"{model}: no such directory, and not to be had from the Hugging Face hub ({_line(error)})"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
