"""Frozen fp32 linear layers on a CPU, with their weights laid out as oneDNN likes them.

The numbers are the same to rounding; with `bf16`, to the rounding of bf16: what goes in and what comes out is fp32, the
products are of bf16 numbers and summed in fp32, as on a GPU. The two operators are torch's own, but not public: where a
torch has none, the layers stay as they are.
"""

from typing import Any


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 (AVX512-BF16 or AMX). On others bf16 is slower than fp32."""
    import torch

    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


def pack_linears(model: Any, backward: bool = False, bf16: bool = False) -> None:
    """Replaces every frozen linear layer of `model` on CPU; with `backward`, gradients of inputs can go through them.

    `bf16`: products in bf16, where the CPU has instructions for it. A frozen layer has no gradient of its own, so its
    backward pass is another linear layer, with the transposed weights.
    """
    import torch

    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    run = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if not (pack and run and torch.backends.mkldnn.is_available()):
        return

    dtype = torch.bfloat16 if bf16 and multiplies_bf16() else torch.float32

    def linear(x, packed, bias):
        return run(x.to(dtype), packed, bias, "none", [], "").float()

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, packed, transposed, bias):
            ctx.transposed = transposed
            return linear(x, packed, bias)

        @staticmethod
        def backward(ctx, gradient):
            return linear(gradient.contiguous(), ctx.transposed, None), None, None, None

    class Packed(torch.nn.Module):
        def __init__(self, plain):
            super().__init__()
            weight = plain.weight.detach().to(dtype)
            self.in_features, self.out_features = plain.in_features, plain.out_features
            self.bias = None if plain.bias is None else plain.bias.detach().to(dtype)
            self.packed = pack(weight, None)
            self.transposed = pack(weight.t().contiguous(), None) if backward else None

        def forward(self, x):
            if self.transposed is None:
                return linear(x, self.packed, self.bias)
            return Through.apply(x, self.packed, self.transposed, self.bias)

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module.weight.requires_grad:
            continue
        if module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Packed(module))
