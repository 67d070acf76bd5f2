"""Peak memory of a recipe, estimated from the two configs before any weight is loaded.

Weights, adapters, optimizer state and the KV cache are counted exactly from the architecture (built on
the meta device). Activations follow the per-layer count of Korthikanti et al. (2022, arXiv 2205.05198),
with recomputation. Not modelled: allocator fragmentation, the CUDA context, temporary copies while
loading. Not checked against a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from medistill_trl.completion_store import DEFAULT_BATCH_SIZE
from medistill_trl.layers import pairs_of
from medistill_trl.losses.chunked import block_elements
from medistill_trl.model_source import ModelSource
from medistill_trl.setting import Arguments

GB = 1e9
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# nf4 with double quantisation: 4 bits, an 8-bit scale per 64 weights, a 32-bit one per 256 of those
# (Dettmers et al. 2023, arXiv 2305.14314, section 3); without, a 32-bit scale per 64.
BYTES_4BIT = {True: (4 + 8 / 64 + 32 / (64 * 256)) / 8, False: (4 + 32 / 64) / 8}
BLOCK_BUFFERS = 10  # float32 tensors a block of losses.chunked holds at a time
SCORE_BUFFERS = 6  # float32 tensors of scores that losses.attention holds at a time
LOSS_ROWS = 256  # completion positions projected to the vocabulary at a time (TRL's chunked_nll)


@dataclass(frozen=True)
class Part:
    """One line of the plan. `phase` is when it is held: always, generate or train."""

    name: str
    gb: float
    phase: str

    @property
    def of_teacher(self) -> bool:
        return self.name.startswith("teacher ")


# (recipe, student's and teacher's config) → what the loss of a method holds while it trains
LossMemory = Callable[[Arguments, PretrainedConfig, PretrainedConfig], list[Part]]


def cross_entropy_memory(
    arguments: Arguments, student: PretrainedConfig, teacher: PretrainedConfig
) -> list[Part]:
    """Of TRL's chunked_nll: logits, their gradient and the log-softmax, in float32."""
    size = LOSS_ROWS * student.vocab_size * 4 * 3
    return [Part(f"loss, {LOSS_ROWS} × {student.vocab_size} logits", size / GB, "train")]


def distillation_memory(
    arguments: Arguments, student: PretrainedConfig, teacher: PretrainedConfig
) -> list[Part]:
    """Of `losses.token_kl`: the teacher's forward pass, a layer at a time, and the logits of both models
    for a chunk of tokens."""
    args = arguments.training
    tokens = args.per_device_train_batch_size * longest(arguments)
    width = 4 * teacher.hidden_size + 2 * teacher.intermediate_size
    forward = tokens * width * DTYPE_BYTES[arguments.teacher.teacher_dtype]
    chunk = args.loss_chunk_size * student.vocab_size
    block = min(chunk, block_elements("cpu" if args.use_cpu else "cuda"))
    logits = f"loss, {args.loss_chunk_size} × {student.vocab_size} logits of both models"
    parts = [
        Part(f"teacher forward, {tokens} tokens", forward / GB, "train"),
        Part(logits, 4 * (2 * chunk + BLOCK_BUFFERS * block) / GB, "train"),
    ]
    return parts + _head_gradient(arguments, student)


def feature_memory(
    arguments: Arguments, student: PretrainedConfig, teacher: PretrainedConfig
) -> list[Part]:
    """Of `losses.features`: the teacher's forward pass, the mapped layers' states of every token, the
    projections with gradient and optimizer state, and the student's logits for a chunk of tokens."""
    args = arguments.training
    pairs = len(pairs_of(args, student, teacher))
    tokens = args.per_device_train_batch_size * longest(arguments)
    width = 4 * teacher.hidden_size + 2 * teacher.intermediate_size
    forward = tokens * width * DTYPE_BYTES[arguments.teacher.teacher_dtype]
    # The teacher's state, and in float32 both models' and their difference.
    state = DTYPE_BYTES[arguments.teacher.teacher_dtype] * teacher.hidden_size
    state += 4 * (student.hidden_size + 3 * teacher.hidden_size)
    parts = [
        Part(f"teacher forward, {tokens} tokens", forward / GB, "train"),
        Part(f"states of {pairs} layer pairs", pairs * tokens * state / GB, "train"),
    ]
    if args.projects:  # weight, gradient and the optimizer's two values, which 8 bits make 2 bytes
        size = 4 + 4 + (2 if "8bit" in args.optim.value else 8)
        size *= pairs * (student.hidden_size + 1) * teacher.hidden_size
        parts.append(Part(f"{pairs} projections, trained", size / GB, "always"))
    return parts + _chunked_cross_entropy(arguments, student) if args.alpha < 1 else parts


def _chunked_cross_entropy(arguments: Arguments, student: PretrainedConfig) -> list[Part]:
    """Of `losses.token_kl` without a teacher."""
    args = arguments.training
    chunk = args.loss_chunk_size * student.vocab_size
    block = min(chunk, block_elements("cpu" if args.use_cpu else "cuda"))
    logits = f"loss, {args.loss_chunk_size} × {student.vocab_size} logits"
    parts = [Part(logits, 4 * (chunk + BLOCK_BUFFERS * block) / GB, "train")]
    return parts + _head_gradient(arguments, student)


def _head_gradient(arguments: Arguments, student: PretrainedConfig) -> list[Part]:
    """Summed in float32 over the chunks, where the head trains."""
    if arguments.student.use_lora:
        return []
    size = 4 * student.vocab_size * student.hidden_size
    return [Part("gradient of the output head", size / GB, "train")]


def attention_memory(
    arguments: Arguments, student: PretrainedConfig, teacher: PretrainedConfig
) -> list[Part]:
    """Of `losses.attention`: the teacher's forward pass, what the mapped layers of both models attend with, and
    their scores for a chunk of positions; and the student's logits for a chunk of tokens."""
    args, length = arguments.training, longest(arguments)
    pairs = len(pairs_of(args, student, teacher))
    rows = args.per_device_train_batch_size
    width = 4 * teacher.hidden_size + 2 * teacher.intermediate_size
    forward = rows * length * width * DTYPE_BYTES[arguments.teacher.teacher_dtype]
    # Float32 at most: as projected and with the rotary embedding, of the student also the gradients.
    width = 3 * _attention_width(student) + 2 * _attention_width(teacher)
    kept = 4 * pairs * rows * length * width
    heads = max(student.num_attention_heads, teacher.num_attention_heads)
    scores = 4 * SCORE_BUFFERS * rows * heads * args.attention_chunk_size * length
    name = f"loss, {args.attention_chunk_size} × {length} scores of {heads} heads"
    parts = [
        Part(f"teacher forward, {rows * length} tokens", forward / GB, "train"),
        Part(f"queries, keys and values of {pairs} layer pairs", kept / GB, "train"),
        Part(name, scores / GB, "train"),
    ]
    return parts + _chunked_cross_entropy(arguments, student) if args.alpha < 1 else parts


def preference_memory(
    arguments: Arguments, student: PretrainedConfig, teacher: PretrainedConfig
) -> list[Part]:
    """Of `losses.preference`: the second completion of each pair, whole logits of both with their
    gradient in float32, and where all weights are trained the reference."""
    rows, length = arguments.training.per_device_train_batch_size, longest(arguments)
    elements = 2 * rows * length * student.vocab_size
    logits = f"loss, 2 × {rows} × {length} × {student.vocab_size} logits"
    again = _activations(student, rows, length, arguments)
    parts = [
        Part("activations of the rejected completions", again / GB, "train"),
        # The logits, their gradient, and of the completions' share the log-softmax.
        Part(logits, 4 * 3 * elements / GB, "train"),
    ]
    if not arguments.student.use_lora and arguments.training.reference == "previous":
        size = _weights(_on_meta(student), arguments.student.student_dtype, None)
        parts.append(Part("reference weights", size / GB, "always"))
    return parts


def policy_memory(
    arguments: Arguments,
    student: PretrainedConfig,
    teacher: PretrainedConfig,
    written: int | None = None,
) -> list[Part]:
    """Of `losses.policy` and of `rewards`: the teacher reads what the student has written, which takes a KV
    cache of its own.

    Args:
        written: Completions drawn together on each process; None: those of an accumulation window.
    """
    args, length = arguments.training, longest(arguments)
    rows = written or args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = arguments.teacher.teacher_batch_size or rows
    cache = _kv_cache(student, rows, length, arguments.student.student_dtype)
    return [
        *distillation_memory(arguments, student, teacher),
        Part(f"student KV cache, {rows} × {length} tokens", cache / GB, "generate"),
    ]


def anchored_policy_memory(
    arguments: Arguments, student: PretrainedConfig, teacher: PretrainedConfig
) -> list[Part]:
    """Of `policy_memory`, and BOND's anchor, a second adapter in float32."""
    parts = policy_memory(arguments, student, teacher)
    if arguments.student.use_lora and arguments.training.keeps_anchor:
        size = 4 * _trained_parameters(_on_meta(student), arguments)
        parts.append(Part("anchor adapter", size / GB, "always"))
    return parts


def plan(
    arguments: Arguments,
    student: ModelSource,
    teacher: ModelSource,
    loss_memory: LossMemory = cross_entropy_memory,
) -> list[Part]:
    """What one device holds, part by part.

    Args:
        loss_memory: The method's.
    """
    counted = [*_held(arguments, student, teacher), *_working(arguments, student, teacher)]
    parts = [Part(name, size / GB, phase) for name, size, phase in counted]
    parts += loss_memory(arguments, student.config, teacher.config)
    served = arguments.teacher.teacher_backend == "server"  # its server holds them
    return [part for part in parts if not (served and part.of_teacher)]


def _held(arguments: Arguments, student: ModelSource, teacher: ModelSource) -> list[tuple]:
    """Weights, adapter, gradients and optimizer state, in bytes."""
    s, t = arguments.student, arguments.teacher
    student_model = _on_meta(student.config)
    four_bit = BYTES_4BIT[s.bnb_4bit_use_double_quant]
    student_linear = four_bit if s.student_load_in_4bit else 1 if s.student_load_in_8bit else None
    teacher_linear = four_bit if t.teacher_load_in_4bit else 1 if t.teacher_load_in_8bit else None
    trained = _trained_parameters(student_model, arguments)
    # PEFT keeps adapters in float32, TRL casts those of quantised models to bfloat16.
    adapter_bytes = 4 if student_linear is None else 2
    weight_bytes = adapter_bytes if s.use_lora else DTYPE_BYTES[s.student_dtype]
    # Adam keeps two values per trained weight in the weight's dtype, or in 8 bits.
    optimizer = arguments.training.optim.value
    state_bytes = 2 if "8bit" in optimizer else 2 * weight_bytes
    parts = [
        (
            "teacher weights",
            _weights(_on_meta(teacher.config), t.teacher_dtype, teacher_linear),
            "always",
        ),
        ("student weights", _weights(student_model, s.student_dtype, student_linear), "always"),
        ("gradients", trained * weight_bytes, "train"),
        (f"optimizer state ({optimizer})", trained * state_bytes, "always"),
    ]
    if s.use_lora:
        parts.insert(2, ("LoRA adapter", trained * weight_bytes, "always"))
    return parts


def _working(arguments: Arguments, student: ModelSource, teacher: ModelSource) -> list[tuple]:
    """KV cache and activations, in bytes."""
    t, training = arguments.teacher, arguments.training
    rows = training.per_device_train_batch_size
    window = rows * training.gradient_accumulation_steps
    prompts = DEFAULT_BATCH_SIZE if t.teacher_completions == "stored" else window
    prompts = t.teacher_batch_size or prompts
    length = longest(arguments)
    return [
        (
            f"teacher KV cache, {prompts} × {length} tokens",
            _kv_cache(teacher.config, prompts, length, t.teacher_dtype),
            "generate",
        ),
        (
            f"student activations, {rows} × {length} tokens",
            _activations(student.config, rows, length, arguments),
            "train",
        ),
    ]


def longest(arguments: Arguments) -> int:
    """Tokens of the longest example."""
    return arguments.data.max_prompt_tokens + arguments.teacher.teacher_max_new_tokens


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


def _weights(model: torch.nn.Module, dtype: str, linear_bytes: float | None) -> float:
    """Bytes of a model whose linear layers take `linear_bytes` a weight; None if not quantised."""
    linear = 0
    if linear_bytes is not None:
        linear = sum(module.weight.numel() for module in _linears(model).values())
    other = sum(parameter.numel() for parameter in model.parameters()) - linear
    return linear * (linear_bytes or 0) + other * DTYPE_BYTES[dtype]


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
    width = _key_value_width(config)
    return config.num_hidden_layers * rows * length * width * DTYPE_BYTES[dtype]


def _attention_width(config: PretrainedConfig) -> int:
    """Numbers of a token's queries, keys and values in one layer."""
    groups = config.num_attention_heads // (
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    )
    return _key_value_width(config) * (2 + groups) // 2


def _key_value_width(config: PretrainedConfig) -> int:
    """Numbers of a token's keys and values in one layer."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * head_dim


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
