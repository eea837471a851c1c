"""Frozen fp32 linear layers on a CPU, with their weights laid out as oneDNN likes them. The numbers are the same to rounding.

The two operators are torch's own, but not public: where a torch has none, the layers stay as they are.
"""

from typing import Any


def pack_linears(model: Any, backward: bool = False) -> None:
    """Replaces every frozen linear layer of `model` on CPU; with `backward`, gradients of inputs can go through them.

    A frozen layer has no gradient of its own, so its backward pass is another linear layer, with the transposed weights.
    """
    import torch

    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    run = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if not (pack and run and torch.backends.mkldnn.is_available()):
        return

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, packed, transposed, bias):
            ctx.transposed = transposed
            return run(x, packed, bias, "none", [], "")

        @staticmethod
        def backward(ctx, gradient):
            return run(gradient.contiguous(), ctx.transposed, None, "none", [], ""), None, None, None

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            weight = linear.weight.detach()
            self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
            self.packed = pack(weight, None)
            self.transposed = pack(weight.t().contiguous(), None) if backward else None

        def forward(self, x):
            if self.transposed is None:
                return run(x, self.packed, self.bias, "none", [], "")
            return Through.apply(x, self.packed, self.transposed, self.bias)

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module.weight.requires_grad:
            continue
        if module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Packed(module))
