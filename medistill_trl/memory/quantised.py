"""Linear layers of 4 and 8 bits with the memory of those of bitsandbytes, which need real weights.

bytes of a weight   4 bits and a float32 scale per 64 weights, or, with double quantisation, an 8-bit one and a
                    float32 per 256 of those (Dettmers et al. 2023, arXiv 2305.14314, section 3);
                    8 bits and a float32 scale per row (arXiv 2208.07339)
forward             4 bits: the whole weight in the dtype of the input, for as long as the product takes;
                    8 bits: the input in float16 and in int8, and it is kept
backward            the whole weight in the dtype of the gradient
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

BLOCK, SCALES_PER_BLOCK = 64, 256


class QuantisedLinear(nn.Linear, ABC):
    """Base of both; PEFT adapts it as any linear layer."""

    def __init__(self, linear: nn.Linear, weight: torch.Tensor, scales: list[torch.Tensor]):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        for number, scale in enumerate(scales):
            self.register_buffer(f"scale_{number}", scale)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.new_empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self)

    @abstractmethod
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` computes, and what of it lives meanwhile."""


class Linear4bit(QuantisedLinear):
    def __init__(self, linear: nn.Linear, double_quant: bool):
        size = linear.weight.numel()
        blocks = math.ceil(size / BLOCK)
        scales = [torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)]
        if double_quant:
            scales.append(torch.empty(math.ceil(blocks / SCALES_PER_BLOCK)))
        super().__init__(linear, torch.empty(math.ceil(size / 2), 1, dtype=torch.uint8), scales)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantised(x.dtype), self.bias)


class Linear8bit(QuantisedLinear):
    def __init__(self, linear: nn.Linear):
        weight = torch.empty(linear.weight.shape, dtype=torch.int8)
        super().__init__(linear, weight, [torch.empty(linear.out_features)])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes = x.to(torch.float16).to(torch.int8)
        return codes.new_empty(*codes.shape[:-1], self.out_features, dtype=x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        if isinstance(layer, Linear8bit):
            ctx.save_for_backward(x)
        return layer.product(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.layer.dequantised(gradient.dtype), None


def quantise(model: nn.Module, in_4bit: bool, double_quant: bool) -> None:
    """All linear layers but the output head, as transformers does; on the meta device.

    Args:
        in_4bit: 4 bits, else 8.
        double_quant: Of 4 bits: quantise the scales too.
    """
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                packed = Linear4bit(child, double_quant) if in_4bit else Linear8bit(child)
                setattr(module, name, packed)
