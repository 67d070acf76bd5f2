"""The models that are evaluated, each with the prompt format that training used.

Weights are loaded when a part first asks for them: a teacher whose results are all stored is never
loaded.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from eval.options import ModelOptions
from medistill_trl import models
from medistill_trl.arguments import StudentArguments, TeacherArguments
from medistill_trl.errors import UserError
from medistill_trl.inputs import student_identity, teacher_identity
from medistill_trl.losses.heads import OutputHead
from medistill_trl.model_checks import check_sound, reading
from medistill_trl.model_source import ModelSource, folder_digest, resolve
from medistill_trl.prompts import PromptFormat
from medistill_trl.recipe import read_saved
from medistill_trl.run_directory import RunDirectory

logger = logging.getLogger(__name__)

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_ADVICE = "continue its run with --resume, or put a copy of the adapter back"
OFFLINE_ADVICE = (  # no overlay: an evaluation takes none
    "without the hub only local folders, .gguf files, package:NAME/FILE.gguf and what the local cache holds can be "
    "evaluated"
)
T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """One model under evaluation.

    Args:
        name: `student` or `teacher`.
        form: Its prompt format; its tokenizer is the model's.
        fingerprint: Names the exact weights, dtype and quantisation; of a teacher the same as the
            completion store has. What the prompt format adds (a system prompt) is not in it.
        source: Where it comes from, for a reader: a hub id, a folder.
        load: Makes the model.
        context_length: Tokens it can attend to; None for an architecture without such a limit.
        quantisation: Of its weights, `nf4`, `fp4` or `int8`; None for full precision.
        requantise: Makes the same model in full precision (None), `nf4` or `int8`; a teacher's only.
    """

    name: str
    form: PromptFormat
    fingerprint: str
    source: str
    load: Callable[[], PreTrainedModel]
    context_length: int | None = None
    quantisation: str | None = None
    requantise: Callable[[str | None], "Subject"] | None = None

    @cached_property
    def model(self) -> PreTrainedModel:
        """In evaluation mode, no parameter requires a gradient; loaded at the first use.

        Raises:
            ValueError: logits made from its hidden states would not be its own.
        """
        logger.info("loading the %s, %s", self.name, self.source)
        model = self.load().requires_grad_(False).eval()
        OutputHead.of(model).check(model)  # perplexity and fidelity go by way of it
        return model


@dataclass(frozen=True)
class Pair:
    """What one evaluation compares.

    Args:
        student: The model evaluated.
        teacher: What it is measured against; None for a model by itself.
        recipe: Of the run; None for models without a run.
    """

    student: Subject
    teacher: Subject | None
    recipe: dict | None

    @property
    def subjects(self) -> list[Subject]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]


def load_run(path: Path, allow_partial: bool = False, trust_remote_code: bool = False) -> Pair:
    """The trained student of a run and its teacher, loaded as the recipe says.

    Args:
        allow_partial: Take a run that has a final model but never finished.
        trust_remote_code: Of whoever evaluates: a run's own recipe cannot give it.

    Raises:
        UserError: there is no run, it is not finished, its base model is another one by now, or its models bring
            code that nobody here said to trust.
    """
    run = RunDirectory(path)
    _check_run(run, allow_partial)
    recipe = read_saved(run.recipe)
    student = _known(StudentArguments, recipe)
    teacher = _known(TeacherArguments, recipe)
    remote = _trusted(run, recipe, trust_remote_code)
    base = resolve(
        student.student_model,
        student.student_revision,
        student.student_keep_layers,
        remote,
        OFFLINE_ADVICE,
    )
    trained_on = run.read_inputs()["student"]
    if base.fingerprint != trained_on:
        raise UserError(
            f"{run.path}: it was trained on {student.student_model} as {trained_on}, and that model is "
            f"{base.fingerprint} now; put the old one back, or train anew"
        )
    system_prompt = recipe.get("system_prompt")
    adapter = run.final_model if student.use_lora else None
    if adapter is None:
        base = resolve(str(run.final_model), trust_remote_code=remote)
    return Pair(
        _student(base, student, adapter, str(run.path), system_prompt, remote),
        _teacher(teacher, student, system_prompt, remote),
        recipe,
    )


def _trusted(run: RunDirectory, recipe: dict, given: bool) -> bool:
    """Whether code that comes with the run's models may be run: a folder from elsewhere must not decide that."""
    if recipe.get("trust_remote_code") and not given:
        raise UserError(
            f"{run.path}: its models bring Python code of their own, which would run here; if you trust it, evaluate "
            "with --trust_remote_code"
        )
    return warn_of_remote_code(given and bool(recipe.get("trust_remote_code")))


def warn_of_remote_code(trusted: bool) -> bool:
    """Say loudly what is about to happen; returns what it was given."""
    if trusted:
        logger.warning("--trust_remote_code: Python code that comes with the models is run here")
    return trusted


def _check_run(run: RunDirectory, allow_partial: bool) -> None:
    if not run.recipe.is_file():
        raise UserError(
            f"{run.path}: no run is here (no recipe.yaml, looked below {Path.cwd()}); name a run "
            "directory, such as outputs/sft_demo, or a model with --model"
        )
    if not run.is_complete and not allow_partial:
        raise UserError(
            f"{run.path}: this run is not finished (no COMPLETE); continue it with --resume, or evaluate "
            "what is there with --allow_partial"
        )
    if not any((run.final_model / name).is_file() for name in (ADAPTER, "config.json")):
        raise UserError(
            f"{run.path}: no model in {run.final_model}; continue the run with --resume"
        )


def load_models(options: ModelOptions) -> Pair:
    """Models by name, without a run.

    Raises:
        UserError: no such model, or the name is a run's.
    """
    if (Path(options.model) / "recipe.yaml").is_file():
        raise UserError(
            f"--model {options.model}: a run is here; evaluate it with python -m eval.run {options.model}"
        )
    remote = warn_of_remote_code(options.trust_remote_code)
    dtype = options.dtype or _default_dtype()
    adapter = Path(options.model) if (Path(options.model) / ADAPTER).is_file() else None
    student = StudentArguments(
        student_model=options.model if adapter is None else _base_of(adapter),
        student_revision=options.revision,
        student_keep_layers=options.keep_layers,
        student_dtype=dtype,
        student_load_in_4bit=options.load_in_4bit,
        student_load_in_8bit=options.load_in_8bit,
    )
    base = resolve(
        student.student_model, options.revision, options.keep_layers, remote, OFFLINE_ADVICE
    )
    subject = _student(base, student, adapter, options.model, options.system_prompt, remote)
    if options.teacher is None:
        return Pair(subject, None, None)
    teacher = TeacherArguments(
        teacher_model=options.teacher,
        teacher_revision=options.teacher_revision,
        teacher_dtype=dtype,
        teacher_load_in_4bit=options.teacher_load_in_4bit,
        teacher_load_in_8bit=options.teacher_load_in_8bit,
    )
    measured = _teacher(teacher, student, options.system_prompt, remote)
    return Pair(subject, measured, None)


def _student(
    base: ModelSource,
    args: StudentArguments,
    adapter: Path | None,
    source: str,
    system_prompt: str | None,
    trust_remote_code: bool,
) -> Subject:
    form = PromptFormat(models.load_tokenizer(base, trust_remote_code), system_prompt)
    plain = replace(args, use_lora=False)  # an adapter is loaded, not begun

    def load() -> PreTrainedModel:
        device = PartialState().device
        model = models.load_student(base, form.tokenizer, plain, device, trust_remote_code)
        return model if adapter is None else _with_adapter(model, adapter)

    fingerprint = student_identity(base, args)
    if adapter is not None:
        fingerprint += f" adapter {folder_digest(adapter)}"
    return Subject("student", form, fingerprint, source, load, base.context_length)


def _teacher(
    args: TeacherArguments,
    student: StudentArguments,
    system_prompt: str | None,
    trust_remote_code: bool,
) -> Subject:
    source = resolve(
        args.teacher_model, args.teacher_revision, None, trust_remote_code, OFFLINE_ADVICE
    )
    form = PromptFormat(models.load_tokenizer(source, trust_remote_code), system_prompt)

    def load() -> PreTrainedModel:
        device = PartialState().device
        return models.load_teacher(source, form.tokenizer, args, student, device, trust_remote_code)

    def requantise(kind: str | None) -> Subject:
        other = replace(
            args, teacher_load_in_4bit=kind == "nf4", teacher_load_in_8bit=kind == "int8"
        )
        nf4 = replace(student, bnb_4bit_quant_type="nf4")  # the recipe's could be fp4
        return _teacher(other, nf4, system_prompt, trust_remote_code)

    eight_bit = "int8" if args.teacher_load_in_8bit else None
    return Subject(
        "teacher",
        form,
        teacher_identity(source, args, student),
        args.teacher_model,
        load,
        source.context_length,
        student.bnb_4bit_quant_type if args.teacher_load_in_4bit else eight_bit,
        requantise,
    )


def _with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    if not (adapter / ADAPTER_WEIGHTS).is_file():  # PEFT would take a pickle, or ask the hub
        raise UserError(
            f"adapter {adapter}: there is no {ADAPTER_WEIGHTS}, and nothing else is read; {ADAPTER_ADVICE}"
        )
    adapter_config(adapter)
    with reading(str(adapter), "adapter", ADAPTER_ADVICE):
        adapted = PeftModel.from_pretrained(model, str(adapter))
        lacking = _lacking(adapted, adapter)
    if lacking:
        raise UserError(
            f"adapter {adapter}: its file lacks {lacking[0]} and {len(lacking) - 1} more; {ADAPTER_ADVICE}"
        )
    check_sound(str(adapter), adapted)
    return adapted


def _lacking(adapted: PeftModel, adapter: Path) -> list[str]:
    """Weights of the adapter that its file does not hold: PEFT leaves them as they were made."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as tensors:
        return sorted(set(get_peft_model_state_dict(adapted)) - set(tensors.keys()))


def adapter_config(adapter: Path) -> dict:
    """adapter_config.json of a LoRA adapter.

    Raises:
        UserError: it is damaged, or of another kind of adapter.
    """
    path = adapter / ADAPTER
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {ADAPTER_ADVICE}") from error
    known = isinstance(config, dict) and isinstance(config.get("base_model_name_or_path"), str)
    if not known or config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: must be of a LoRA adapter and name its base_model_name_or_path; {ADAPTER_ADVICE}"
        )
    return config


def _base_of(adapter: Path) -> str:
    return adapter_config(adapter)["base_model_name_or_path"]


def _default_dtype() -> str:
    return "bfloat16" if torch.accelerator.is_available() else "float32"


def _known(arguments: type[T], recipe: dict) -> T:
    """The part of a saved recipe that an arguments dataclass holds."""
    names = {item.name for item in fields(arguments)}
    return arguments(**{key: value for key, value in recipe.items() if key in names})
