"""From typed arguments to loaded models and data, in two steps: what is cheap to check, then weights."""

import logging
from dataclasses import dataclass

from transformers import set_seed

from medistill_trl import model_source, models
from medistill_trl.checkpoints import Totals
from medistill_trl.completion_store import CompletionStore
from medistill_trl.data import DataReport, Prompt, read_prompts
from medistill_trl.heldout import HeldoutCheck
from medistill_trl.model_source import ModelSource
from medistill_trl.prompts import PromptFormat
from medistill_trl.setting import Arguments, Setting
from medistill_trl.teacher import Teacher

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """What is known before any weights are loaded: enough for a dry run."""

    student: ModelSource
    teacher: ModelSource
    student_form: PromptFormat
    teacher_form: PromptFormat
    train_prompts: list[Prompt]
    validation_prompts: list[Prompt]
    reports: list[DataReport]


def load_inputs(arguments: Arguments) -> Loaded:
    """Configs, tokenizers and prompts: all that can be wrong before the long part begins."""
    s, t, d = arguments.student, arguments.teacher, arguments.data
    remote = arguments.training.trust_remote_code
    teacher = model_source.resolve(t.teacher_model, t.teacher_revision, None, remote)
    student = model_source.resolve(
        s.student_model, s.student_revision, s.student_keep_layers, remote
    )
    forms = [
        PromptFormat(models.load_tokenizer(source, remote), d.system_prompt)
        for source in (student, teacher)
    ]

    def too_long(prompt: Prompt) -> str | None:
        for role, form in zip(("student", "teacher"), forms, strict=True):
            length = len(form.encode(form.render(prompt.question)))
            if length > d.max_prompt_tokens:
                return f"the prompt has {length} {role} tokens, more than max_prompt_tokens: {d.max_prompt_tokens}"
        return None

    train_prompts, train_report = read_prompts(
        d.train_file, d.on_bad_row, d.max_train_samples, too_long
    )
    validation_prompts, validation_report = read_prompts(
        d.validation_file, d.on_bad_row, arguments.run.heldout_prompts, too_long
    )
    for report in (train_report, validation_report):
        if report.skipped:
            logger.warning(
                "%s: skipped %d of %d rows:", report.path, len(report.skipped), report.read
            )
            for line in report.skipped:
                logger.warning("  %s", line)
    reports = [train_report, validation_report]
    return Loaded(student, teacher, *forms, train_prompts, validation_prompts, reports)


def load_models(arguments: Arguments, loaded: Loaded) -> Setting:
    """Teacher and student on this process's device, and the held-out completions."""
    s, t, training = arguments.student, arguments.teacher, arguments.training
    set_seed(training.seed)
    logger.info("loading teacher %s", t.teacher_model)
    teacher_model = models.load_teacher(
        loaded.teacher,
        loaded.teacher_form.tokenizer,
        t,
        s,
        training.device,
        training.trust_remote_code,
    )
    bits = "4bit" if t.teacher_load_in_4bit else "8bit" if t.teacher_load_in_8bit else "full"
    teacher = Teacher(
        teacher_model,
        loaded.teacher_form.tokenizer,
        loaded.teacher_form,
        f"{loaded.teacher.fingerprint} {t.teacher_dtype} {bits} {s.bnb_4bit_quant_type if bits == '4bit' else ''}".strip(),
    )
    logger.info("loading student %s", s.student_model)
    student = models.load_student(
        loaded.student,
        loaded.student_form.tokenizer,
        s,
        training.device,
        training.trust_remote_code,
    )
    store = CompletionStore(t.completion_store)
    heldout = HeldoutCheck.prepare(
        loaded.student_form,
        teacher,
        loaded.validation_prompts,
        store,
        t.teacher_max_new_tokens,
        t.teacher_batch_size,
    )
    return Setting(
        arguments,
        student,
        loaded.student_form,
        teacher,
        store,
        loaded.train_prompts,
        heldout,
        Totals(),
    )
