"""Weights that are shared out among processes by ZeRO-3 (arXiv 1910.02054).

Each forward of such a model collects its weights layer by layer from all processes. All must make the same number of
forwards, or they wait for each other until the process group's timeout.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config


def is_shared_out(model: nn.Module) -> bool:
    """Whether some of a model's weights are on other processes; then all must run it equally often."""
    return any(weight.numel() == 0 for weight in model.parameters())


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it is, or a copy of it in full where it is shared out; then all processes must ask."""
    if weight.numel() > 0:
        return weight
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


def share_out(model: PreTrainedModel, zero: dict) -> PreTrainedModel:
    """Share a frozen model out among the processes.

    Args:
        model: Loaded within `loading_shares`.
        zero: The run's own ZeRO-3 settings, of which the model takes what it needs.

    Returns:
        The same model, which collects its weights in each forward.
    """
    import deepspeed

    deepspeed.initialize(model=model, config=_frozen_config(model.dtype, zero))
    return model


@contextmanager
def loading_shares(dtype: torch.dtype, zero: dict) -> Iterator[None]:
    """Within the block `from_pretrained` gives each process its share, without one ever holding the whole."""
    alive = HfDeepSpeedConfig(_frozen_config(dtype, zero))  # transformers keeps a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def _frozen_config(dtype: torch.dtype, zero: dict) -> dict:
    kept = ("stage3_param_persistence_threshold", "offload_param")
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **{key: zero[key] for key in kept if key in zero}},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": float("inf"),
    }
