"""Tokenizers, the student and the frozen teacher, with device, dtype and quantisation explicit."""

import logging
from functools import cache

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from medistill_trl.arguments import StudentArguments, TeacherArguments
from medistill_trl.errors import UserError
from medistill_trl.model_checks import check_complete, check_sound, reading
from medistill_trl.model_source import WEIGHTS_ADVICE, ModelSource
from medistill_trl.sharding import loading_shares, share_out

logger = logging.getLogger(__name__)


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer whose pad token differs from its EOS.

    With pad == EOS, masks built from pad ids would drop the EOS a model has to learn.

    Raises:
        UserError: no EOS, or no other special token that could serve as pad.
    """
    advice = "the folder or repository needs a tokenizer.json that belongs to the model"
    with reading(source.name, "tokenizer", advice):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=trust_remote_code
        )
        tokenizer.encode("a probe")
    _check_rows(tokenizer, source)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model {source.name}: its tokenizer has no end-of-sequence token; set one there"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _other_special_token(tokenizer, source)
        _say_padding(source.name, tokenizer.pad_token)
    tokenizer.padding_side = "right"
    return tokenizer


@cache  # teacher and student may be of one source
def _say_padding(name: str, token: str) -> None:
    logger.info("%s: padding with %s, since pad and EOS were the same", name, token)


def _check_rows(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    """Refuse a tokenizer that says more than the model can read: its ids would lie beyond the embedding.

    Tokens that were added for other uses may lie there; the prompts are looked through for them.
    """
    rows = source.num_embeddings
    added = tokenizer.get_added_vocab()
    beyond = {token: id for token, id in tokenizer.get_vocab().items() if id >= rows}
    needed = [
        t for t in beyond if t not in added or t in (tokenizer.eos_token, tokenizer.bos_token)
    ]
    if needed:
        raise UserError(
            f"model {source.name}: its tokenizer knows {needed[0]!r} as token {beyond[needed[0]]}, and the model has "
            f"{rows} embeddings; tokenizer and weights are not of one model"
        )
    if beyond:
        logger.warning(
            "%s: %d added tokens lie beyond its %d embeddings, such as %r; a prompt that holds one is refused",
            source.name,
            len(beyond),
            rows,
            next(iter(beyond)),
        )


def _other_special_token(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> str:
    """A token to pad with: unk first, then special tokens the chat template does not use, then others,
    BOS as the last. Masks come from lengths, so a pad that also stands in text does no harm here."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    used = [token for token in added if token in (tokenizer.chat_template or "")]
    unused = [token for token in added if token not in used and token != tokenizer.bos_token]
    candidates = [tokenizer.unk_token, *unused, *used, tokenizer.bos_token]
    for token in candidates:
        if token is None or token == tokenizer.eos_token:
            continue
        if tokenizer.convert_tokens_to_ids(token) < source.num_embeddings:
            return token
    raise UserError(
        f"model {source.name}: its tokenizer has no special token but EOS to pad with; add one there"
    )


def quantization(
    in_4bit: bool, in_8bit: bool, dtype: torch.dtype, args: StudentArguments
) -> BitsAndBytesConfig | None:
    if in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if in_8bit else None


def _load(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device | None,
    quantization_config: BitsAndBytesConfig | None,
    attention: str,
    trust_remote_code: bool,
) -> PreTrainedModel:
    with reading(source.name, "weights", WEIGHTS_ADVICE):
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=source.revision,
            dtype=dtype,
            device_map=None if device is None else {"": device},
            quantization_config=quantization_config,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # a pickle may run code when it is opened
            output_loading_info=True,
        )
    check_complete(source.name, loading)
    return model


def load_teacher(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    args: TeacherArguments,
    student_args: StudentArguments,
    device: torch.device,
    trust_remote_code: bool = False,
    zero: dict | None = None,
) -> PreTrainedModel:
    """The teacher: in evaluation mode, no parameter requires a gradient.

    Args:
        zero: The run's ZeRO-3 settings; `teacher_sharding: sharded` needs them.
    """
    dtype = getattr(torch, args.teacher_dtype)
    attention = student_args.attn_implementation
    if args.teacher_sharding == "sharded":
        with loading_shares(dtype, zero):
            model = _load(source, dtype, None, None, attention, trust_remote_code)
        model = share_out(model.requires_grad_(False), zero)
    else:
        in_4bit, in_8bit = args.teacher_load_in_4bit, args.teacher_load_in_8bit
        config = quantization(in_4bit, in_8bit, dtype, student_args)
        model = _load(source, dtype, device, config, attention, trust_remote_code)
    check_sound(source.name, model)
    set_generation(model, tokenizer)
    return model.requires_grad_(False).eval()


def load_student(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    args: StudentArguments,
    device: torch.device,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The student, LoRA-wrapped if the recipe says so; a `PeftModel` then, else all weights train."""
    dtype = getattr(torch, args.student_dtype)
    config = quantization(args.student_load_in_4bit, args.student_load_in_8bit, dtype, args)
    model = _load(source, dtype, device, config, args.attn_implementation, trust_remote_code)
    keep_4bit_trainable(model)
    check_sound(source.name, model)
    set_generation(model, tokenizer)
    model.config.use_cache = (
        False  # training never reuses keys; generation asks for the cache itself
    )
    return adapted(model, args) if args.use_lora else model


def adapted(model: PreTrainedModel, args: StudentArguments) -> PeftModel:
    """The model with a LoRA adapter to train.

    Raises:
        UserError: no module has such a name.
    """
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or "all-linear",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora_target_modules {args.lora_target_modules}: {error}") from error


def keep_4bit_trainable(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    It repacks them at the first evaluation-mode forward, and from then on every gradient through the
    layer is zero, without an error (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Drop the sampling defaults a checkpoint ships (temperature, repetition penalty, ...): decoding
    is what the recipe says. The end-of-turn tokens stay."""
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=_end_ids(model.generation_config, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )


def end_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end what a model writes, without its weights: those `set_generation` would keep."""
    try:
        shipped = GenerationConfig.from_pretrained(source.location, revision=source.revision)
    except OSError:  # it ships none, and transformers makes one of its config
        shipped = GenerationConfig.from_model_config(source.config)
    return _end_ids(shipped, tokenizer)


def _end_ids(shipped: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ends = shipped.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({id for id in (*ends, tokenizer.eos_token_id) if id is not None})
