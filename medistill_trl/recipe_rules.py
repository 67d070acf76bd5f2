"""Rules of a recipe that no single field can state: inherited limits, refused keys, conflicts.

Plain data and functions without torch, so that a wrong recipe is refused before anything loads.
"""

import re
from collections.abc import Iterator

from medistill_trl import trackers

# Limits of keys inherited from Transformers and TRL, which declare none themselves.
INHERITED_LIMITS: dict[str, dict[str, float]] = {
    "learning_rate": {"above": 0},
    "per_device_train_batch_size": {"min": 1},
    "per_device_eval_batch_size": {"min": 1},
    "gradient_accumulation_steps": {"min": 1},
    "num_train_epochs": {"above": 0},
    "max_steps": {"min": -1},
    "warmup_steps": {"min": 0},
    "weight_decay": {"min": 0},
    "max_grad_norm": {"min": 0},
    "adam_beta1": {"min": 0, "below": 1},
    "adam_beta2": {"min": 0, "below": 1},
    "adam_epsilon": {"above": 0},
    "logging_steps": {"above": 0},
    "eval_steps": {"above": 0},
    "save_steps": {"above": 0},
    # One checkpoint is always being replaced; resuming needs a second one that is whole.
    "save_total_limit": {"min": 2},
    "max_length": {"min": 2},
    "seed": {"min": 0, "max": 2**32 - 1},
    "data_seed": {"min": 0, "max": 2**32 - 1},
    "dataloader_num_workers": {"min": 0},
}

LONGEST_NAME = 200  # bytes of a folder's name, beside the method's

# Keys the parent classes accept and this project does not, with what to do instead.
REFUSED = {
    "hub_token": "a recipe is saved with the run and may be shared; log in with `hf auth login` instead",
    "push_to_hub": "training never uploads; push the finished adapter afterwards",
    "resume_from_checkpoint": "use --resume, which picks the newest checkpoint that is whole",
    "auto_find_batch_size": "it changes the effective batch, so methods are no longer comparable; set "
    "per_device_train_batch_size and gradient_accumulation_steps",
    "logging_nan_inf_filter": "a NaN or infinite loss stops the run here and is never hidden",
    "ignore_data_skip": "a resumed run must see the data an uninterrupted one would",
    "label_smoothing_factor": "the loss never holds whole rows of logits, which smoothing needs",
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "losses read hidden states by hooks, which a compiled model may leave out",
    ),
    "assistant_only_loss": "the loss is on the completion, always",
    "completion_only_loss": "the loss is on the completion, always",
    "deepspeed": "choose the engine with accelerate launch --config_file",
    "fsdp": "choose the engine with accelerate launch --config_file",
    "fsdp_config": "choose the engine with accelerate launch --config_file",
    "save_only_model": "a checkpoint without optimizer and RNG state cannot be resumed exactly",
    "model_init_kwargs": "use the student_* keys",
    "chat_template_path": "each model keeps its own chat template",
    "dataset_text_field": "the columns of a prompt file are fixed: id, source, question, reference, answer",
    "dataset_kwargs": "the data is prepared by the method",
    "eos_token": "set it in the model's own tokenizer",
    "pad_token": "a pad token other than EOS is chosen at load and reported",
    "packing": "completions are written during training and are not packed",
    "eval_packing": "completions are not packed",
    "padding_free": "completions are padded, which every attention implementation supports",
    "remove_unused_columns": "the method needs the prompt columns",
    "do_train": "running a recipe trains",
    "do_eval": "use eval_strategy",
    "do_predict": "use eval_strategy",
    "local_rank": "the launcher sets it",
    "skip_memory_metrics": "peak memory is always recorded",
}

# Hub tokens, and keys that look as if they held a credential.
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})\b"
    r"|://[^/\s:@\"]+:[^/\s@\"]+@"  # a password in an address, which holds no quotation mark
)
SECRET_KEY = re.compile(r"(^|_)(token|api_key|apikey|password|secret)$")


def conflicts(values: dict) -> Iterator[tuple[str, str]]:
    """Yield `(key, problem)` for keys that contradict each other, or this machine.

    Args:
        values: Key → value of the merged recipe; keys left out have their defaults filled in where
            those are literals.
    """
    yield from _model_conflicts(values)
    yield from _server_conflicts(values)
    yield from _completion_conflicts(values)
    yield from _run_conflicts(values)


def _model_conflicts(values: dict) -> Iterator[tuple[str, str]]:
    for role in ("student", "teacher"):
        if values.get(f"{role}_load_in_4bit") and values.get(f"{role}_load_in_8bit"):
            yield (
                f"{role}_load_in_8bit",
                f"conflicts with {role}_load_in_4bit: a model is loaded one way; set one to false",
            )
    if values.get("teacher_sharding") == "sharded":
        for key in ("teacher_load_in_4bit", "teacher_load_in_8bit"):
            if values.get(key):
                yield (
                    "teacher_sharding",
                    f"sharded shares out plain weights only: set {key}: false, or teacher_sharding: replicated",
                )
    quantised = values.get("student_load_in_4bit") or values.get("student_load_in_8bit")
    if quantised and values.get("use_lora") is False:
        yield (
            "use_lora",
            "quantised weights cannot be trained: set use_lora: true, or load unquantised",
        )
    if "lm_head" in (values.get("lora_target_modules") or []):
        yield (
            "lora_target_modules",
            "leave out lm_head: the loss reads the output head's weight directly",
        )
    layers = values.get("student_keep_layers")
    if layers is not None and (not layers or layers != sorted(set(layers)) or layers[0] < 0):
        yield "student_keep_layers", "must list layers once each, in ascending order from 0"


def _server_conflicts(values: dict) -> Iterator[tuple[str, str]]:
    url = values.get("teacher_url")
    if values.get("teacher_backend") == "server" and not url:
        yield (
            "teacher_url",
            "required with teacher_backend: server, such as http://127.0.0.1:8000/v1",
        )
    if url and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
        yield (
            "teacher_url",
            "must be http://host:port or https://…, with a path or none, and without user or query; a key goes into "
            "the environment variable MEDISTILL_TEACHER_API_KEY",
        )


def _completion_conflicts(values: dict) -> Iterator[tuple[str, str]]:
    online = values.get("teacher_completions") == "online"
    if (values.get("num_completions") or 1) > 1:
        if values.get("teacher_temperature") == 0:
            yield (
                "num_completions",
                "greedy completions of one prompt are all alike: raise teacher_temperature",
            )
        if online:
            yield "num_completions", "needs teacher_completions: stored; online draws one per visit"
    if online and values.get("train_sampling_strategy") in ("group_by_length", "batch_rebalance"):
        yield (
            "train_sampling_strategy",
            "needs teacher_completions: stored; online lengths are unknown",
        )
    if values.get("teacher_logits") == "stored":
        yield from _stored_logits_conflicts(values)
    prompt, new, total = (
        values.get(key) for key in ("max_prompt_tokens", "teacher_max_new_tokens", "max_length")
    )
    if None not in (prompt, new, total) and prompt + new > total:
        yield (
            "max_length",
            f"is {total}, less than max_prompt_tokens + teacher_max_new_tokens = {prompt} + {new}: "
            "completions would be cut",
        )


def _stored_logits_conflicts(values: dict) -> Iterator[tuple[str, str]]:
    if values.get("teacher_completions") == "online":
        yield (
            "teacher_logits",
            "stored needs teacher_completions: stored; what is written anew each time is read only then",
        )
    if values.get("lmbda"):
        yield (
            "lmbda",
            "must be 0 with teacher_logits: stored; the teacher reads what the student writes only online",
        )
    if values.get("teacher_sharding") == "sharded":
        yield (
            "teacher_sharding",
            "must be replicated with teacher_logits: stored; before training each process has the teacher read its own "
            "share of the completions, and in training the teacher is not in memory",
        )


def _run_conflicts(values: dict) -> Iterator[tuple[str, str]]:
    if values.get("fp16"):
        yield (
            "fp16",
            "not supported: its loss scaler overflows by design; use bf16: true, or neither",
        )
    if values.get("max_steps") == 0:
        yield "max_steps", "must be positive, or -1 to train for num_train_epochs"
    if values.get("output_dir") == "":
        yield (
            "output_dir",
            "is empty; name a folder, or leave it out for outputs/<method>_<run_name>",
        )
    name = str(values.get("run_name") or "")
    if re.search(r"[/\\]|^\.\.?$", name):
        yield "run_name", "is the last part of a folder's name; use output_dir for a path"
    if not name.isprintable() or len(name.encode("utf-8", "replace")) > LONGEST_NAME:
        yield "run_name", f"names a folder: printable, and at most {LONGEST_NAME} bytes"
    for problem in trackers.problems(values.get("report_to", "none")):
        yield "report_to", problem


def cautions(values: dict) -> Iterator[tuple[str, str]]:
    """Yield `(key, warning)` for what works but is probably not meant."""
    if values.get("teacher_temperature") == 0:
        for key, neutral in (("teacher_top_p", 1.0), ("teacher_top_k", 0)):
            if values.get(key) != neutral:
                yield key, "has no effect on greedy decoding (teacher_temperature: 0)"
    if values.get("teacher_backend") == "server":
        for key in ("teacher_load_in_4bit", "teacher_load_in_8bit"):
            if values.get(key):
                yield key, "has no effect: a served teacher is loaded as its server was told to"
        if values.get("teacher_sharding") == "sharded":
            yield (
                "teacher_sharding",
                "has no effect: no weights of a served teacher are loaded here",
            )
    elif values.get("teacher_url"):
        yield "teacher_url", "has no effect with teacher_backend: local"
    if values.get("trust_remote_code"):
        yield "trust_remote_code", "runs Python code from the model's repository on this machine"
    if values.get("student_dtype") == "float16":
        yield "student_dtype", "float16 gradients may underflow; bfloat16 does not"
    if values.get("save_strategy") == "no":
        yield "save_strategy", "without checkpoints an interrupted run starts from the beginning"
