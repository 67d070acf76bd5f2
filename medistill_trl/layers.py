"""Decoder layers of two models: which learns from which, and what comes out of them.

Layers count from 1. Layer n is the output of the n-th decoder block; the last one too is taken there, before
the final norm, so that all layers mean the same: the residual stream.

    token ids → embeddings → block 1 → block 2 → … → block L → final norm → output head
                                ↓         ↓              ↓
                             layer 1   layer 2        layer L

Shapes: B batch, T time, H hidden size, S student's and L teacher's number of layers.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PretrainedConfig, PreTrainedModel

from medistill_trl.errors import UserError

STRATEGIES = ("uniform", "last", "skip")


# --- which layer learns from which


@dataclass
class LayerArguments:
    """The keys of the methods that compare layers."""

    LIMITS = {"num_layer_pairs": {"min": 1}}  # see schema.py

    layer_mapping: dict | str = field(
        default="uniform",
        metadata={
            "help": "uniform, last or skip, which choose num_layer_pairs pairs (see layers.py); or student layer: "
            "teacher layer, such as {6: 12, 12: 24}. Layers count from 1."
        },
    )
    num_layer_pairs: int = field(
        default=2,
        metadata={"help": "Pairs that a strategy chooses; an explicit mapping has its own."},
    )


def pairs_of(
    args: LayerArguments, student: PretrainedConfig, teacher: PretrainedConfig
) -> list[tuple[int, int]]:
    """`layer_pairs` by the recipe's keys, for two models of these configs."""
    return layer_pairs(
        args.layer_mapping,
        args.num_layer_pairs,
        student.num_hidden_layers,
        teacher.num_hidden_layers,
    )


def layer_pairs(
    mapping: str | dict[int | str, int],
    num_pairs: int,
    student_layers: int,
    teacher_layers: int,
) -> list[tuple[int, int]]:
    """(student layer, teacher layer) for every pair, by ascending student layer.

    With S student and L teacher layers and P pairs, i = 1 … P, the strategies are

    - `uniform`: (⌊i·S/P⌋, ⌊i·L/P⌋), evenly spaced and ending at the last layer of both. With P = S this is
      the uniform mapping of TinyBERT (Jiao et al. 2020, arXiv 1909.10351).
    - `last`: (S−P+i, L−P+i), the last P layers of both, in order. PKD-last (Sun et al. 2019, arXiv 1908.09355),
      but with the very last layer, which PKD leaves to its loss on the predictions; P = 1 is MiniLM's choice
      (arXiv 2002.10957).
    - `skip`: (s, ⌊s·L/S⌋) for the P student layers s before the last. With L = k·S the teacher's layers are every
      k-th; P = S − 1 is PKD-skip.

    Args:
        mapping: One of the strategies, or student layer → teacher layer; keys may be texts, as JSON has them.
        num_pairs: P; an explicit mapping does not look at it.
        student_layers: S.
        teacher_layers: L.

    Raises:
        UserError: a layer that does not exist, more pairs than there are layers, an unknown strategy.
    """
    if isinstance(mapping, dict):
        return _explicit_pairs(mapping, student_layers, teacher_layers)
    if mapping not in STRATEGIES:
        raise UserError(
            f"layer_mapping: {mapping!r} is not a strategy; one of {', '.join(STRATEGIES)}, or a mapping from "
            "student layers to teacher layers such as {6: 12, 12: 24}"
        )
    most = min(student_layers - 1 if mapping == "skip" else student_layers, teacher_layers)
    if not 1 <= num_pairs <= most:
        raise UserError(
            f"num_layer_pairs: must lie between 1 and {most} for layer_mapping: {mapping}, {student_layers} student "
            f"and {teacher_layers} teacher layers; got {num_pairs}"
        )
    if mapping == "uniform":
        count = range(1, num_pairs + 1)
        return [(i * student_layers // num_pairs, i * teacher_layers // num_pairs) for i in count]
    if mapping == "last":
        offset = teacher_layers - student_layers
        first = student_layers - num_pairs + 1
        return [(layer, layer + offset) for layer in range(first, student_layers + 1)]
    # A teacher with fewer layers than the student has no layer ⌊s·L/S⌋ for the first ones.
    layers = range(student_layers - num_pairs, student_layers)
    return [(layer, max(1, layer * teacher_layers // student_layers)) for layer in layers]


def _explicit_pairs(
    mapping: dict[int | str, int], student_layers: int, teacher_layers: int
) -> list[tuple[int, int]]:
    if not mapping:
        raise UserError("layer_mapping: names no layers; give at least one pair such as {6: 12}")
    pairs = [
        (_layer(key, "student", student_layers), _layer(value, "teacher", teacher_layers))
        for key, value in mapping.items()
    ]
    if len(dict(pairs)) < len(pairs):
        raise UserError(f"layer_mapping: names a student layer twice: {mapping}; keep one of them")
    return sorted(pairs)


def _layer(given: int | str, role: str, count: int) -> int:
    layer = int(given) if isinstance(given, str) and given.isdecimal() else given
    if type(layer) is not int or not 1 <= layer <= count:
        raise UserError(
            f"layer_mapping: there is no {role} layer {given!r}; the {role}'s layers are 1 to {count} (1 is the "
            "output of the first block; the embeddings are not a layer)"
        )
    return layer


# --- what comes out of them


def base_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside the wrappers of DDP and PEFT; adapted layers stay adapted."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model, in order; block n is at index n − 1.

    Args:
        model: May be wrapped by PEFT and by DDP.

    Raises:
        UserError: an architecture whose decoder does not hold its blocks in one list.
    """
    base = base_model(model)
    count = base.config.get_text_config().num_hidden_layers
    found = [
        module
        for module in base.get_decoder().children()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        raise UserError(
            f"model type {base.config.model_type!r}: its decoder has {len(found)} lists of {count} blocks, so its "
            "layers cannot be told; take a decoder-only model such as Llama, Qwen2 or Mistral, or a method that "
            "looks at outputs alone (logit_kd, sft)"
        )
    return found[0]


@contextmanager
def captured(model: nn.Module, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Keeps the outputs of some layers of the forward passes within, and of no others.

    What is kept carries the graph. Gradient checkpointing recomputes the inside of a block and not the hook
    on it, so backward may run within the context or after it.

    Args:
        model: May be wrapped by PEFT and by DDP.
        layers: Counted from 1.

    Yields:
        Layer → hidden states (B, T, H) before the final norm, filled by each forward.
    """
    blocks = decoder_layers(model)
    states: dict[int, torch.Tensor] = {}

    def keeper(layer: int):
        def keep(module, inputs, output):
            states[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    hooks = [blocks[layer - 1].register_forward_hook(keeper(layer)) for layer in set(layers)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


class _LayerReached(Exception):
    """The layer that a forward pass was run for has its output."""


def run_through(
    model: nn.Module,
    last_layer: int,
    input_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor,
) -> None:
    """A forward pass that ends behind a layer: no later block, final norm or output head is touched.

    The model's own forward makes positions and masks; it is left by an exception as soon as the layer's hooks
    have run, so nothing here depends on the architecture. Use it within `captured`.

    Args:
        model: May be wrapped by PEFT, not by DDP, which would wait for its backward.
        last_layer: Counted from 1.
        input_ids_BT: Moved to the model's device.
        attention_mask_BT: 1 for tokens, 0 for padding.
    """

    def stop(module, inputs, output):
        raise _LayerReached

    base = base_model(model)
    hook = decoder_layers(model)[last_layer - 1].register_forward_hook(stop)
    try:
        base.get_decoder()(
            input_ids=input_ids_BT.to(base.device),
            attention_mask=attention_mask_BT.to(base.device),
            use_cache=False,
        )
    except _LayerReached:
        pass
    finally:
        hook.remove()
