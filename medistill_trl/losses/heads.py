"""A model's way from its last hidden states to its logits, a chunk of tokens at a time.

A plain linear head is a product with its weight, and its gradient another. Any other head (quantised,
LoRA-wrapped) is called, and differentiated by autograd within the chunk.

Products run in the head's own dtype, or in autocast's where that is on, as in the model; their result
is float32 (float64 if asked for), and so is everything after it.

Shapes: C tokens of a chunk, H hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from medistill_trl.sharding import whole


def states_before_head(
    model: nn.Module, student: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward of a student that trains, for losses that go through the head themselves.

    Args:
        model: The student, wrapped as it trains: DDP must see a forward of the whole.
        student: The same model, not wrapped by DDP.
        inputs: `input_ids` and `attention_mask`, (B, T).

    Returns:
        The decoder's last hidden states, after the final norm, (B, T, H), and the logits of the last
        position alone, (B, 1, V); both with their graph.
    """
    base = student.get_base_model() if isinstance(student, PeftModel) else student
    seen = []
    hook = base.get_decoder().register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state)
    )
    try:
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=1,
            use_cache=False,
        )
    finally:
        hook.remove()
    return seen[-1], output.logits


class Projection(ABC):
    """The logits of one chunk, and the way back.

    Args:
        logits_CV: Scaled and capped, float32; the holder may overwrite them.
    """

    logits_CV: torch.Tensor

    @abstractmethod
    def backward(
        self,
        gradient_CV: torch.Tensor,
        hidden_gradient_CH: torch.Tensor | None,
        parameter_gradients: Sequence[torch.Tensor | None],
    ) -> None:
        """Write the hidden states' gradient and add to the parameters'; None is not wanted.

        Args:
            gradient_CV: With respect to the head's raw product, before scale and cap.
            hidden_gradient_CH: Overwritten.
            parameter_gradients: In the order of the head's `parameters`.
        """


@dataclass(frozen=True)
class OutputHead(ABC):
    """logits = softcap · tanh(scale · raw / softcap), without the tanh if there is no cap.

    Args:
        scale: Factor on the raw product (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: Gemma-2's `final_logit_softcapping`.
    """

    scale: float = field(default=1.0, kw_only=True)
    softcap: float | None = field(default=None, kw_only=True)

    @staticmethod
    def of(model: PreTrainedModel) -> "OutputHead":
        """The head of a causal language model, also one inside a `PeftModel`.

        Scale and cap are read from the configuration; `check` proves them.
        """
        config = model.config.get_text_config().to_dict()
        scale = config.get("logit_scale") or 1.0  # Cohere
        scale /= config.get("logits_scaling") or 1.0  # Granite
        softcap = config.get("final_logit_softcapping")  # Gemma 2 and later
        module = model.get_output_embeddings()
        if type(module) is nn.Linear:  # quantised layers are subclasses, adapters wrap it
            bias = None if module.bias is None else whole(module.bias)
            return LinearHead(whole(module.weight), bias, scale=scale, softcap=softcap)
        return CalledHead(module, scale=scale, softcap=softcap)

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """Prove on a few tokens that this head gives the model's own logits.

        A model may scale its logits by an attribute of another name; a wrong scale would train, wrongly.

        Raises:
            ValueError: it does not.
        """
        seen = []
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        was_training = model.training
        model.eval()
        ids = torch.arange(4, device=model.device)[
            None
        ]  # 0 alone may be a pad, whose state is zero
        expected = model(input_ids=ids).logits
        hook.remove()
        logits = self.project(seen[0][0], torch.float32, track=False).logits_CV
        model.train(was_training)
        tolerance = 0.02 if expected.dtype.itemsize < 4 else 1e-3
        if not torch.allclose(logits, expected[0].float(), rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"model type {model.config.model_type!r} does something else to its logits than "
                f"scale={self.scale:g} and softcap={self.softcap}; its logits would be wrong here"
            )

    @property
    @abstractmethod
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """Tensors that may want a gradient."""

    @abstractmethod
    def narrow(self, vocab_size: int) -> "OutputHead":
        """The head of the first `vocab_size` tokens only."""

    @abstractmethod
    def project(self, hidden_CH: torch.Tensor, dtype: torch.dtype, track: bool) -> Projection:
        """Logits of a chunk in `dtype`; with `track` it can go backward."""

    def finish_(self, raw_CV: torch.Tensor) -> torch.Tensor:
        """Raw product to logits, in place."""
        if self.scale != 1:
            raw_CV.mul_(self.scale)
        if self.softcap is not None:
            raw_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw_CV

    def finish_backward_(self, gradient_RV: torch.Tensor, logits_RV: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to the logits to that of the raw product, in place."""
        if self.softcap is not None:  # d(c·tanh(x/c))/dx = 1 − (y/c)²
            gradient_RV.mul_((logits_RV / self.softcap).square_().neg_().add_(1))
        return gradient_RV if self.scale == 1 else gradient_RV.mul_(self.scale)


@dataclass(frozen=True)
class LinearHead(OutputHead):
    """A plain matrix, tied to the embeddings or not.

    Args:
        weight: (V, H).
        bias: (V,) or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def narrow(self, vocab_size: int) -> "LinearHead":
        rows = len(self.weight)
        if vocab_size > rows:
            raise ValueError(f"vocab_size {vocab_size} is more than the {rows} rows of the head")
        if vocab_size == rows:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def project(self, hidden_CH: torch.Tensor, dtype: torch.dtype, track: bool) -> Projection:
        return _LinearProjection(self, hidden_CH.to(self.weight.dtype), dtype)


class _LinearProjection(Projection):
    def __init__(self, head: LinearHead, hidden_CH: torch.Tensor, dtype: torch.dtype):
        self.head = head
        self.hidden_CH = hidden_CH
        self.logits_CV = head.finish_(nn.functional.linear(hidden_CH, *head.parameters).to(dtype))

    def backward(self, gradient_CV, hidden_gradient_CH, parameter_gradients):
        weight = self.head.weight
        # The products of the way back run in the same dtype as those of the way there.
        if hidden_gradient_CH is not None:
            hidden_gradient_CH.copy_(gradient_CV.to(weight.dtype) @ weight)
        if parameter_gradients[0] is not None:
            _add_product(parameter_gradients[0], gradient_CV.T, self.hidden_CH)
        if self.head.bias is not None and parameter_gradients[1] is not None:
            parameter_gradients[1].add_(gradient_CV.sum(0))


def _add_product(total_VH: torch.Tensor, left_VC: torch.Tensor, right_CH: torch.Tensor) -> None:
    """total += left @ right, without a second (V, H) tensor where the dtypes allow."""
    if right_CH.dtype == total_VH.dtype:
        total_VH.addmm_(left_VC, right_CH)
    else:
        total_VH.add_(left_VC.to(right_CH.dtype) @ right_CH)


@dataclass(frozen=True)
class CalledHead(OutputHead):
    """A head that is more than a matrix: quantised, LoRA-wrapped, saved beside an adapter.

    Args:
        module: Maps (C, H) to (C, V).
        vocab_size: Leading tokens to keep; None for all.
    """

    module: nn.Module
    vocab_size: int | None = None

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        return tuple(p for p in self.module.parameters() if p.requires_grad)

    def narrow(self, vocab_size: int) -> "CalledHead":
        return replace(self, vocab_size=vocab_size)

    def project(self, hidden_CH: torch.Tensor, dtype: torch.dtype, track: bool) -> Projection:
        return _CalledProjection(self, hidden_CH, dtype, track)


class _CalledProjection(Projection):
    def __init__(self, head: CalledHead, hidden_CH: torch.Tensor, dtype: torch.dtype, track: bool):
        self.head = head
        self.hidden_CH = hidden_CH.detach().requires_grad_(track)
        with torch.set_grad_enabled(track):
            self.raw_CV = head.module(self.hidden_CH)[:, : head.vocab_size]
        if head.vocab_size is not None and self.raw_CV.shape[1] < head.vocab_size:
            raise ValueError(
                f"vocab_size {head.vocab_size} is more than the {self.raw_CV.shape[1]} rows of the head"
            )
        # A copy: autograd may need the raw product as it is.
        self.logits_CV = head.finish_(self.raw_CV.detach().to(dtype, copy=True))

    def backward(self, gradient_CV, hidden_gradient_CH, parameter_gradients):
        targets = [hidden_gradient_CH, *parameter_gradients]
        inputs = [self.hidden_CH, *self.head.parameters]
        wanted = [(t, i) for t, i in zip(targets, inputs, strict=True) if t is not None]
        gradients = torch.autograd.grad(
            self.raw_CV,
            [i for _, i in wanted],
            gradient_CV.to(self.raw_CV.dtype),
            materialize_grads=True,  # an adapter that is not active gets zero
        )
        for (total, _), gradient in zip(wanted, gradients, strict=True):
            total.add_(gradient)
