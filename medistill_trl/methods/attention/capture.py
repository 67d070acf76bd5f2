"""Queries, keys and values of some layers of a model, from hooks on these layers alone.

The model computes them anyway, whatever its attention implementation, and all layers stay on it: what is
recorded are the outputs of the projections. The rotary embedding is applied to them once more, after the
forward pass, since gradient checkpointing allows no work within a block that its recomputation would lack.

Shapes: B batch, T time, H query heads, K key heads, D size of a head.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from medistill_trl.errors import UserError
from medistill_trl.layers import base_model, decoder_layers, run_through
from medistill_trl.losses.attention import AttentionInputs

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class LayerAttention:
    """One layer's self-attention, as its last forward pass had it.

    Args:
        block: A decoder block with `self_attn.q_proj`, `k_proj` and `v_proj`; these may be adapted or quantised.
    """

    def __init__(self, block: nn.Module):
        self.module = block.get_submodule("self_attn")
        self._projected: dict[str, torch.Tensor] = {}
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None

    def hooks(self) -> list[RemovableHandle]:
        return [
            self.module.register_forward_pre_hook(self._keep_rotation, with_kwargs=True),
            *(self._hook(name) for name in PROJECTIONS),
        ]

    def _hook(self, name: str) -> RemovableHandle:
        def keep(module, inputs, output):
            self._projected[name] = output

        return self.module.get_submodule(name).register_forward_hook(keep)

    def _keep_rotation(self, module, args, kwargs):
        self._rotation = kwargs["position_embeddings"]

    def inputs(self) -> AttentionInputs:
        """Queries and keys after the rotary embedding, values; with the graph."""
        queries, keys, values = (
            self._projected[name].unflatten(2, (-1, self.module.head_dim)).transpose(1, 2)
            for name in PROJECTIONS
        )
        queries, keys = apply_rotary_pos_emb(queries, keys, *self._rotation)
        return AttentionInputs(queries, keys, values, self.module.scaling)


@contextmanager
def captured_attention(
    model: nn.Module, layers: Iterable[int]
) -> Iterator[dict[int, LayerAttention]]:
    """Records the attention of some layers in the forward passes within, and of no others.

    Leave the context before backward: a recomputed block would be recorded again.

    Args:
        model: May be wrapped by PEFT and by DDP.
        layers: Counted from 1.

    Yields:
        Layer → its attention; ask for `inputs()` after a forward pass.

    Raises:
        UserError: blocks without `self_attn` and its projections.
    """
    blocks = decoder_layers(model)
    attention = {layer: _layer_attention(model, blocks[layer - 1]) for layer in sorted(set(layers))}
    with ExitStack() as stack:
        for one in attention.values():
            for hook in one.hooks():
                stack.callback(hook.remove)
        yield attention


def _layer_attention(model: nn.Module, block: nn.Module) -> LayerAttention:
    names = {name for name, _ in block.named_modules()}
    missing = {"self_attn", *(f"self_attn.{name}" for name in (*PROJECTIONS, "o_proj"))} - names
    if missing:
        raise _unsupported(model, f"its blocks have no {', '.join(sorted(missing))}")
    return LayerAttention(block)


@torch.no_grad()
def check_attention(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """Prove on a few tokens that a model attends with these queries, keys and values.

    An architecture may do more to them than the rotary embedding (Qwen3 normalises them, Gemma 2 caps the
    scores); the maps would be wrong then, and training would go on.

    Args:
        model: May be wrapped by PEFT; its training mode is restored.
        layers: Counted from 1.

    Raises:
        UserError: it does not.
    """
    ids = torch.arange(8)[None]
    attended = {}

    def keeper(layer: int):
        def keep(module, inputs):
            attended[layer] = inputs[0]

        return keep

    was_training = model.training
    model.eval()
    with captured_attention(model, layers) as attention, ExitStack() as stack:
        for layer, one in attention.items():
            hook = one.module.get_submodule("o_proj").register_forward_pre_hook(keeper(layer))
            stack.callback(hook.remove)
        run_through(model, max(attention), ids, torch.ones_like(ids))
    model.train(was_training)
    for layer, one in attention.items():
        expected, found = attended[layer], _attend(one.inputs())
        tolerance = 0.02 if expected.dtype.itemsize < 4 else 1e-3
        if not torch.allclose(found, expected.float(), rtol=tolerance, atol=tolerance):
            raise _unsupported(model, f"layer {layer} does something else to its queries and keys")


def _attend(inputs: AttentionInputs) -> torch.Tensor:
    """What goes into the output projection, (B, T, H·D), float32."""
    queries, keys, values = (states.float() for states in inputs[:3])
    mixed_BHTD = F.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=inputs.scaling, enable_gqa=True
    )
    return mixed_BHTD.transpose(1, 2).flatten(2)


def _unsupported(model: nn.Module, problem: str) -> UserError:
    return UserError(
        f"model type {base_model(model).config.model_type!r}: {problem}, and attention transfer knows "
        "query, key and value projections with the rotary embedding alone, as in Llama, Qwen2 and Mistral; "
        "take such a model, or a method that looks at other things (logit_kd, fitnets)"
    )
