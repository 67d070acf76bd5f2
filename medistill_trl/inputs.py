"""From typed arguments to loaded models and data, in two steps: what is cheap to check, then weights."""

import logging
from dataclasses import dataclass

from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from medistill_trl import model_source, models, teacher_server
from medistill_trl.arguments import StudentArguments, TeacherArguments
from medistill_trl.checkpoints import Totals
from medistill_trl.completion_store import CompletionStore
from medistill_trl.data import DataReport, Prompt, leave_out_heldout, read_prompts
from medistill_trl.engines import DDP, engine_of
from medistill_trl.errors import UserError
from medistill_trl.heldout import HeldoutCheck
from medistill_trl.model_source import ModelSource
from medistill_trl.on_demand_teacher import OnDemandTeacher
from medistill_trl.prompts import PromptFormat
from medistill_trl.served_teacher import ServedTeacher, served_identity
from medistill_trl.setting import Arguments, Setting, logits_folder
from medistill_trl.teacher import Teacher
from medistill_trl.teacher_server import TeacherServer

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
    server: TeacherServer | None = None  # that answers for the teacher


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

    needed = _check_context(arguments, student, teacher)
    server = teacher_server.connect(t, needed) if t.teacher_backend == "server" else None

    def too_long(prompt: Prompt) -> str | None:
        for role, form, source in zip(
            ("student", "teacher"), forms, (student, teacher), strict=True
        ):
            ids = form.encode(form.render(prompt.question))
            if not ids:
                return f"the prompt has no {role} tokens"
            if len(ids) > d.max_prompt_tokens:
                return f"the prompt has {len(ids)} {role} tokens, more than max_prompt_tokens: {d.max_prompt_tokens}"
            if max(ids) >= source.num_embeddings:
                token = form.tokenizer.convert_ids_to_tokens(max(ids))
                return f"the prompt holds {token!r}, for which the {role} has no embedding"
        return None

    train_prompts, train_report = read_prompts(
        d.train_file, d.on_bad_row, d.max_train_samples, too_long
    )
    validation_prompts, validation_report = read_prompts(
        d.validation_file, d.on_bad_row, arguments.run.heldout_prompts, too_long
    )
    train_prompts = leave_out_heldout(train_prompts, validation_prompts, train_report, d.on_bad_row)
    for report in (train_report, validation_report):
        if report.skipped:
            logger.warning(
                "%s: skipped %d of %d rows:", report.path, len(report.skipped), report.read
            )
            for line in report.skipped:
                logger.warning("  %s", line)
    reports = [train_report, validation_report]
    return Loaded(student, teacher, *forms, train_prompts, validation_prompts, reports, server)


def _check_context(arguments: Arguments, *sources: ModelSource) -> int:
    """Prompt and completion together must fit what each model can attend to.

    Returns:
        Their tokens, at most.
    """
    needed = arguments.data.max_prompt_tokens + arguments.teacher.teacher_max_new_tokens
    for source in sources:
        limit = source.context_length
        if limit is not None and needed > limit:
            raise UserError(
                f"max_prompt_tokens + teacher_max_new_tokens is {needed}, and {source.name} attends to "
                f"{limit} tokens at most; lower one of them"
            )
    return needed


def identity(arguments: Arguments, loaded: Loaded) -> dict:
    """What a run's numbers depend on besides its recipe; a resumed run must find the same again."""
    engine = engine_of(arguments, PartialState())
    return {
        "num_processes": PartialState().num_processes,
        **({} if engine == DDP else {"engine": engine}),  # their checkpoints differ
        "teacher": _identity_of_teacher(arguments, loaded),
        "student": loaded.student.fingerprint,
        **{f"sha256 of {report.path}": report.sha256 for report in loaded.reports},
    }


def _identity_of_teacher(arguments: Arguments, loaded: Loaded) -> str:
    if loaded.server is not None:
        return served_identity(loaded.server, loaded.teacher)
    return teacher_identity(loaded.teacher, arguments.teacher, arguments.student)


def teacher_identity(source: ModelSource, args: TeacherArguments, s: StudentArguments) -> str:
    """Names the teacher's exact weights, dtype and quantisation."""
    return _loaded_as(
        source, args.teacher_dtype, args.teacher_load_in_4bit, args.teacher_load_in_8bit, s
    )


def student_identity(source: ModelSource, args: StudentArguments) -> str:
    """The same of a student, without an adapter."""
    return _loaded_as(
        source, args.student_dtype, args.student_load_in_4bit, args.student_load_in_8bit, args
    )


def _loaded_as(
    source: ModelSource, dtype: str, in_4bit: bool, in_8bit: bool, args: StudentArguments
) -> str:
    words = [source.fingerprint, dtype]
    if in_4bit:
        words += ["4bit", args.bnb_4bit_quant_type]
        words += ["double_quant"] if args.bnb_4bit_use_double_quant else []
    if in_8bit:
        words += ["8bit"]
    return " ".join(words)


def load_models(arguments: Arguments, loaded: Loaded, keeps_teacher: bool = True) -> Setting:
    """Teacher and student on this process's device, and the held-out completions.

    Args:
        keeps_teacher: False: its model is loaded once something asks for it, and the held-out check is made to
            do without. Of a served teacher there is none.
    """
    s, t, training = arguments.student, arguments.teacher, arguments.training
    set_seed(training.seed)
    teacher = _teacher(arguments, loaded, keeps_teacher)
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
        training.bf16,
    )
    if teacher.gives_logits and not keeps_teacher:
        heldout.keep_states(logits_folder(store) / "heldout", training.device)
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


def _teacher(arguments: Arguments, loaded: Loaded, keep: bool) -> Teacher:
    """Behind a server, in memory, or loaded once something asks for it."""
    t, training = arguments.teacher, arguments.training
    form, source = loaded.teacher_form, loaded.teacher
    if loaded.server is not None:
        logger.info("teacher %s: served by %s", t.teacher_model, loaded.server.url)
        ends = models.end_ids(source, form.tokenizer)
        return ServedTeacher(loaded.server, source, form.tokenizer, form, ends, training.device)

    def load() -> PreTrainedModel:
        logger.info("loading teacher %s", t.teacher_model)
        return models.load_teacher(
            source,
            form.tokenizer,
            t,
            arguments.student,
            training.device,
            training.trust_remote_code,
            training.deepspeed_plugin
            and training.deepspeed_plugin.deepspeed_config["zero_optimization"],
        )

    identity = _identity_of_teacher(arguments, loaded)
    if keep:
        return Teacher(load(), form.tokenizer, form, identity)
    return OnDemandTeacher(load, form.tokenizer, form, identity)
