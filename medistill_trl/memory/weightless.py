"""The two models as a run would load them, without weights."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from medistill_trl.arguments import StudentArguments, TeacherArguments
from medistill_trl.memory.quantised import quantise
from medistill_trl.models import adapted


def at_depth(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of the same model with its first `layers` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def teacher(
    config: PretrainedConfig, args: TeacherArguments, student_args: StudentArguments
) -> PreTrainedModel:
    """On the meta device: parameters and buffers have shapes alone."""
    quantised = args.teacher_load_in_4bit, args.teacher_load_in_8bit
    model = _model(config, args.teacher_dtype, student_args, *quantised)
    return model.requires_grad_(False).eval()


def student(config: PretrainedConfig, args: StudentArguments) -> PreTrainedModel:
    """On the meta device; LoRA-wrapped if the recipe says so."""
    quantised = args.student_load_in_4bit, args.student_load_in_8bit
    model = _model(config, args.student_dtype, args, *quantised)
    if not args.use_lora:
        return model
    with torch.device("meta"):
        model = adapted(model, args)
    if any(quantised):  # as TRL does, since QLoRA does (arXiv 2305.14314)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _model(
    config: PretrainedConfig, dtype: str, args: StudentArguments, in_4bit: bool, in_8bit: bool
) -> PreTrainedModel:
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=args.attn_implementation
        )
        model.tie_weights()  # part of the initialisation that is left out
        if in_4bit or in_8bit:
            quantise(model, in_4bit, args.bnb_4bit_use_double_quant)
    return model


def fill(model: nn.Module) -> nn.Module:
    """Give every parameter and buffer on the meta device a storage that a meter in force counts."""
    known: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in known:
                        known[id(tensor)] = _like(tensor)
                    tensors[name] = known[id(tensor)]
    return model


def _like(tensor: torch.Tensor) -> torch.Tensor:
    storage = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(storage, requires_grad=tensor.requires_grad)
    return storage


class _GPUDropout(nn.Module):
    """With a mask of bytes, as CUDA's kernel has it; on the CPU the mask is of floats."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.training else x


def as_on_a_gpu(model: nn.Module) -> None:
    """Replace what takes another amount of memory there."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, _GPUDropout(child.p))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' advice on models that nobody will train."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
