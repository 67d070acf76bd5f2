"""The engines that `accelerate launch` runs under a trainer, and what is different with DeepSpeed.

    none, DDP   every process holds both models whole
    zero2       gradients and optimizer states are shared out (ZeRO, arXiv 1910.02054)
    zero3       the student's weights too, and the teacher's with `teacher_sharding: sharded`
    fsdp2       like zero3, by PyTorch; needs GPUs

A method names the engines it works with, see `methods.Method`. DeepSpeed takes the optimizer step within the last
backward of a window, takes none whose gradients are not finite, and saves and loads checkpoints itself.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from medistill_trl.errors import UserError

if TYPE_CHECKING:
    from medistill_trl.methods import Method
    from medistill_trl.setting import Arguments

logger = logging.getLogger(__name__)

DDP, ZERO2, ZERO3, FSDP2 = "ddp", "zero2", "zero3", "fsdp2"
DEEPSPEED = (ZERO2, ZERO3)
SAFE_LOADING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load looks at it, whatever its caller says


# --- which one runs --------------------------------------------------------------------------------


def values_without_accelerator(use_cpu: bool, engine: str | None) -> dict:
    """Training arguments that a machine without a GPU needs.

    Args:
        use_cpu: The launcher was told to leave GPUs alone.
        engine: accelerate's name of the engine that was asked for.

    Raises:
        UserError: it needs GPUs.
    """
    if not use_cpu and torch.accelerator.is_available():
        return {}
    if engine == "FSDP":
        raise UserError(
            "accelerate runs FSDP2 on GPUs alone, and here is none (with use_cpu it would start runs that know nothing "
            "of each other); on the CPU take --config_file accelerate_configs/cpu_ddp.yaml, or zero2.yaml or zero3.yaml "
            "with DS_ACCELERATOR=cpu in the environment"
        )
    if engine == "DEEPSPEED":  # use_cpu would switch it off
        return {"ddp_backend": "gloo", "dataloader_pin_memory": False}
    return {"use_cpu": True, "dataloader_pin_memory": False}


def in_accelerates_words(state: PartialState) -> str:
    """Engine or kind of processes of this run, as accelerate calls it; FSDP is set up later than the processes."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and state.distributed_type is DistributedType.MULTI_GPU:
        return DistributedType.FSDP.value
    return state.distributed_type.value


def engine_of(arguments: "Arguments", state: PartialState) -> str:
    """One of this module's names; a single process counts as `ddp`."""
    plugin = arguments.training.deepspeed_plugin
    if plugin is not None:
        return ZERO3 if plugin.zero_stage == 3 else ZERO2
    return FSDP2 if in_accelerates_words(state) == DistributedType.FSDP.value else DDP


def check(method: "Method", arguments: "Arguments", engine: str) -> None:
    """Refuse what does not work on the engine, before anything is loaded.

    Raises:
        UserError: naming method or key, and what works.
    """
    if engine not in (DDP, *method.engines):
        why = f" ({method.engine_note})" if method.engine_note else ""
        works = " or ".join(f"{name}.yaml" for name in method.engines if name in DEEPSPEED)
        raise UserError(
            f"method {method.name} does not run on {engine}{why}; take --config_file accelerate_configs/multi_gpu.yaml, "
            f"on the CPU cpu_ddp.yaml{', or ' + works if works else ''}"
        )
    sharded = arguments.teacher.teacher_sharding == "sharded"
    if sharded and engine != ZERO3:
        raise UserError(
            f"teacher_sharding: sharded needs ZeRO-3, and this run's engine is {engine}; launch with --config_file "
            "accelerate_configs/zero3.yaml, or set teacher_sharding: replicated"
        )
    if sharded and not method.shards_teacher:
        raise UserError(
            f"teacher_sharding: sharded does not work with {method.name}, which does not ask the teacher equally often on "
            "all processes, or stops it amid a forward; set teacher_sharding: replicated"
        )
    student = arguments.student
    if engine == ZERO3 and (student.student_load_in_4bit or student.student_load_in_8bit):
        raise UserError(
            "student_load_in_4bit, student_load_in_8bit: ZeRO-3 shares out plain weights only; load the student "
            "unquantised, or take --config_file accelerate_configs/zero2.yaml"
        )
    if engine == ZERO3 and not student.use_lora:
        raise UserError(
            "use_lora: false: under ZeRO-3 the output head has to be frozen, since losses go through its weight outside "
            "of a forward; set use_lora: true, or take --config_file accelerate_configs/zero2.yaml"
        )
    if engine == FSDP2:
        logger.warning(
            "warning: FSDP2 has never been run with this suite, for want of GPUs; compare the first losses with those of "
            "multi_gpu.yaml"
        )


# --- checkpoints -----------------------------------------------------------------------------------


@contextmanager
def reading_no_code(deepspeed: bool) -> Iterator[None]:
    """Within the block no pickle of a checkpoint runs code; DeepSpeed itself would open it without this care.

    Args:
        deepspeed: The run is DeepSpeed's. Else nothing is done: torch takes care by itself.

    Raises:
        pickle.UnpicklingError: within, for a checkpoint with other things than training saves.
    """
    if not deepspeed:
        yield
        return
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    saved = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    before = os.environ.get(SAFE_LOADING)
    os.environ[SAFE_LOADING] = "1"
    try:
        with torch.serialization.safe_globals(saved):
            yield
    finally:
        os.environ.pop(SAFE_LOADING)
        if before is not None:
            os.environ[SAFE_LOADING] = before
