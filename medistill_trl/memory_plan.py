"""Peak memory of a recipe, estimated from the two configs before any weight is loaded.

Weights, adapters, optimizer state and the KV cache are counted exactly from the architecture (built on
the meta device). Activations follow the per-layer count of Korthikanti et al. (2022, arXiv 2205.05198),
with recomputation. Not modelled: allocator fragmentation, the CUDA context, temporary copies while
loading. Not checked against a GPU.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from medistill_trl.model_source import ModelSource
from medistill_trl.setting import Arguments

GB = 1e9
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# nf4 with double quantisation: 4 bits, an 8-bit scale per 64 weights, a 32-bit one per 256 of those
# (Dettmers et al. 2023, arXiv 2305.14314, section 3); without, a 32-bit scale per 64.
BYTES_4BIT = {True: (4 + 8 / 64 + 32 / (64 * 256)) / 8, False: (4 + 32 / 64) / 8}
LOSS_ROWS = 256  # completion positions projected to the vocabulary at a time (TRL's chunked_nll)


@dataclass(frozen=True)
class Part:
    """One line of the plan. `phase` is when it is held: always, generate or train."""

    name: str
    gb: float
    phase: str


def plan(arguments: Arguments, student: ModelSource, teacher: ModelSource) -> list[Part]:
    """What one device holds, part by part."""
    s, t, training = arguments.student, arguments.teacher, arguments.training
    student_model, teacher_model = _on_meta(student.config), _on_meta(teacher.config)
    trained = _trained_parameters(student_model, arguments)
    # PEFT keeps adapters in float32, TRL casts those of quantised models to bfloat16.
    quantised = s.student_load_in_4bit or s.student_load_in_8bit
    weight_bytes = (2 if quantised else 4) if s.use_lora else DTYPE_BYTES[s.student_dtype]
    # Adam keeps two values per trained weight in the weight's dtype, or in 8 bits.
    optimizer = 2 if "8bit" in training.optim.value else 2 * weight_bytes
    rows = training.per_device_train_batch_size
    window = t.teacher_batch_size or rows * training.gradient_accumulation_steps
    if t.teacher_completions == "stored":
        window = t.teacher_batch_size or 16
    length = arguments.data.max_prompt_tokens + t.teacher_max_new_tokens
    parts = [
        Part(
            "teacher weights",
            _weights(
                teacher_model,
                t.teacher_dtype,
                t.teacher_load_in_4bit,
                t.teacher_load_in_8bit,
                s.bnb_4bit_use_double_quant,
            ),
            "always",
        ),
        Part(
            "student weights",
            _weights(
                student_model,
                s.student_dtype,
                s.student_load_in_4bit,
                s.student_load_in_8bit,
                s.bnb_4bit_use_double_quant,
            ),
            "always",
        ),
        Part(
            "LoRA adapter" if s.use_lora else "trained weights (held above)",
            trained * weight_bytes * s.use_lora,
            "always",
        ),
        Part("gradients", trained * weight_bytes, "train"),
        Part(f"optimizer state ({training.optim.value})", trained * optimizer, "always"),
        Part(
            f"teacher KV cache, {window} × {length} tokens",
            _kv_cache(teacher.config, window, length, t.teacher_dtype),
            "generate",
        ),
        Part(
            f"student activations, {rows} × {length} tokens",
            _activations(student.config, rows, length, arguments),
            "train",
        ),
        Part(
            f"loss, {LOSS_ROWS} × {student.config.vocab_size} logits",
            LOSS_ROWS * student.config.vocab_size * 4 * 3,
            "train",
        ),
    ]
    return [Part(part.name, part.gb / GB, part.phase) for part in parts]


def peak(parts: list[Part]) -> tuple[float, str]:
    """The larger of the two phases, in GB, and its name."""
    always = sum(part.gb for part in parts if part.phase == "always")
    phases = {
        phase: always + sum(part.gb for part in parts if part.phase == phase)
        for phase in ("generate", "train")
    }
    name = max(phases, key=phases.get)
    return phases[name], name


def to_text(parts: list[Part]) -> str:
    width = max(len(part.name) for part in parts)
    lines = [f"  {part.name:<{width}}  {part.gb:8.2f} GB  {part.phase}" for part in parts]
    total, phase = peak(parts)
    lines.append(f"  {'peak':<{width}}  {total:8.2f} GB  in phase {phase}")
    lines.append(
        "  An estimate: on a GPU add about 1 GB and 10 % for context and fragmentation, on CPU about 1 GB "
        "for Python and libraries."
    )
    return "\n".join(lines)


def _on_meta(config: PretrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Linear layers that are quantised and adapted: all but the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def _weights(
    model: torch.nn.Module, dtype: str, in_4bit: bool, in_8bit: bool, double_quant: bool
) -> float:
    quantised = 0
    if in_4bit or in_8bit:
        quantised = sum(module.weight.numel() for module in _linears(model).values())
    other = sum(parameter.numel() for parameter in model.parameters()) - quantised
    per_weight = BYTES_4BIT[double_quant] if in_4bit else 1
    return quantised * per_weight + other * DTYPE_BYTES[dtype]


def _trained_parameters(model: torch.nn.Module, arguments: Arguments) -> int:
    args = arguments.student
    if not args.use_lora:
        return sum(parameter.numel() for parameter in model.parameters())
    names = args.lora_target_modules
    return sum(
        args.lora_r * (module.in_features + module.out_features)
        for name, module in _linears(model).items()
        if names is None or name.rpartition(".")[2] in names
    )


def _kv_cache(config: PretrainedConfig, rows: int, length: int, dtype: str) -> float:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * rows * length * heads * head_dim * DTYPE_BYTES[dtype]


def _activations(config: PretrainedConfig, rows: int, length: int, arguments: Arguments) -> float:
    """34 bytes per token and hidden unit in a layer at 2-byte precision, without attention scores
    (sdpa never stores them); with checkpointing one layer at a time plus every layer's input."""
    size = (
        2
        if arguments.training.bf16 or arguments.training.fp16
        else DTYPE_BYTES[arguments.student.student_dtype]
    )
    tokens = rows * length * config.hidden_size
    one_layer = 17 * size * tokens
    if arguments.training.gradient_checkpointing:
        return one_layer + config.num_hidden_layers * size * tokens
    return config.num_hidden_layers * one_layer
