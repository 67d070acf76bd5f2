"""One training run, from a checked recipe to a run directory, as a straight line."""

import json
import logging
import os
import time
from dataclasses import asdict, dataclass

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import TrlParser

from medistill_trl import console, launch, memory_plan, methods, model_source, models, run_record
from medistill_trl.arguments import SHARED
from medistill_trl.checkpoints import CheckpointCallback, Totals, load_totals
from medistill_trl.completion_store import CompletionStore
from medistill_trl.data import DataReport, Prompt, read_prompts
from medistill_trl.errors import RunFailed, UserError
from medistill_trl.guards import FiniteGuard
from medistill_trl.heldout import HeldoutCallback, HeldoutCheck
from medistill_trl.hub import write_model_card
from medistill_trl.methods import Method
from medistill_trl.model_source import ModelSource
from medistill_trl.prompts import PromptFormat, encode_example
from medistill_trl.recipe import Recipe
from medistill_trl.run_directory import RunDirectory
from medistill_trl.setting import Arguments, Setting
from medistill_trl.teacher import Teacher

logger = logging.getLogger(__name__)

# Not for a recipe to choose: see recipe_rules.REFUSED and methods.md, 13.
FORCED = {"logging_nan_inf_filter": False, "ddp_find_unused_parameters": False}


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


def run(recipe: Recipe) -> RunDirectory | None:
    """Train what a recipe describes.

    Returns:
        The run directory, with everything but pictures and COMPLETE; None after a dry run.

    Raises:
        UserError: what the user can mend, before or during training.
    """
    console.quiet_loading_bars()
    method = methods.load(recipe.values["method"])
    directory = RunDirectory(recipe.output_dir)
    asked = launch.requested()
    arguments = build_arguments(recipe, method, directory, asked.use_cpu)
    state = PartialState()
    launch.check_processes(asked, state.num_processes, state.distributed_type.value)
    _use_all_cores(state)
    if not arguments.run.dry_run:
        directory.check(recipe)
    loaded = load_inputs(arguments)
    if arguments.run.dry_run:
        print_plan(recipe, arguments, loaded)
        state.destroy_process_group()
        return None
    state.wait_for_everyone()  # nobody starts the folder while another still checks it
    if state.is_main_process:
        directory.start(recipe)
    state.wait_for_everyone()
    setting = load_models(arguments, loaded)
    before = measure_before(setting, directory)
    trainer = build_trainer(method, setting)
    train(trainer, setting.totals, directory, arguments.run.resume)
    write_results(trainer, setting, directory, recipe, loaded, before)
    state.wait_for_everyone()
    state.destroy_process_group()  # exiting with it alive aborts the process
    return directory


def build_arguments(
    recipe: Recipe, method: Method, directory: RunDirectory, use_cpu: bool
) -> Arguments:
    """Typed objects from a checked recipe, built by TRL's parser.

    Building them starts the process group. With several processes and no accelerator that succeeds
    only if `use_cpu` says so.
    """
    parser = TrlParser((*SHARED, method.config))
    values = {**recipe.values, **FORCED, "output_dir": str(directory.checkpoints)}
    if use_cpu or not torch.accelerator.is_available():
        values["use_cpu"] = True
    try:
        run_, student, teacher, data, training = parser.parse_dict(values)
    except ValueError as error:
        raise UserError(f"recipe: {error}") from error
    return Arguments(run_, student, teacher, data, training)


def _use_all_cores(state: PartialState) -> None:
    """accelerate launch sets one thread a process; on CPU that would leave cores idle."""
    if state.device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))


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


def print_plan(recipe: Recipe, arguments: Arguments, loaded: Loaded) -> None:
    """The dry run: resolved recipe, memory plan, one example as the student will see it."""
    if not PartialState().is_main_process:
        return
    prompt = loaded.train_prompts[0]
    form = loaded.student_form
    example = encode_example(form, prompt.question, prompt.reference, True, None)
    trained = [token for token in example["labels"] if token >= 0]
    rendered = form.tokenizer.decode(example["input_ids"][: -len(trained)])
    parts = memory_plan.plan(arguments, loaded.student, loaded.teacher)
    print(f"# resolved recipe\n{recipe.to_yaml()}")
    print(f"# memory plan, per device\n{memory_plan.to_text(parts)}\n")
    print(
        f"# prompts: {len(loaded.train_prompts)} to train on, {len(loaded.validation_prompts)} held out\n"
    )
    print(
        f"# one example ({prompt.id}), what the teacher is asked\n{loaded.teacher_form.render(prompt.question)}\n"
    )
    print(f"# what the student sees, {len(rendered)} characters without loss\n{rendered}\n")
    print(
        f"# what it learns: the teacher's completion, at most {arguments.teacher.teacher_max_new_tokens} "
        f"teacher tokens; here the reference stands in for it, {len(trained)} tokens with loss\n"
        f"{form.tokenizer.decode(trained)}\n"
    )
    print("dry run: everything checked, nothing trained")


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


def measure_before(setting: Setting, directory: RunDirectory) -> dict:
    """The held-out check of the untrained student; measured once and kept over resumes."""
    name = "heldout_before.json"
    if not (directory.results / name).exists():
        before = {
            "measured": setting.heldout.measure(setting.student),
            "answers": setting.heldout.examples(
                setting.student, setting.arguments.teacher.teacher_max_new_tokens
            ),
        }
        if PartialState().is_main_process:
            directory.write_result(name, before)
        PartialState().wait_for_everyone()
    before = directory.read_result(name)
    logger.info("held out, before training: %s", describe(before["measured"]))
    return before


def describe(measured: dict) -> str:
    """A held-out measurement in one line."""
    if measured["kl_nats"] is None:
        return f"CE {measured['ce_nats']:.3f} nats, {measured['bits_per_byte']:.3f} bits per byte"
    return (
        f"KL(T‖S) {measured['kl_nats']:.3f} nats, CE {measured['ce_nats']:.3f} nats, "
        f"top-1 agreement {measured['top1']:.1%}"
    )


def build_trainer(method: Method, setting: Setting) -> Trainer:
    trainer = method.build(setting)
    start = time.monotonic()

    def totals() -> Totals:
        nonlocal start
        now = time.monotonic()
        setting.totals.seconds += now - start
        start = now
        return setting.totals

    trainer.add_callback(FiniteGuard(trainer))
    trainer.add_callback(CheckpointCallback(totals))
    trainer.add_callback(HeldoutCallback(setting.heldout))
    return trainer


def train(trainer: Trainer, totals: Totals, directory: RunDirectory, resume: bool) -> None:
    """Train to the end, from the newest valid checkpoint when resuming.

    Raises:
        RunFailed: training stopped early; no result is written then.
    """
    checkpoint = None
    if resume:
        checkpoint, passed_over = directory.checkpoint_to_resume()
        for line in passed_over:
            logger.warning("%s", line)
        logger.info(
            "resuming from %s", checkpoint or "the beginning: no whole checkpoint was saved"
        )
    if checkpoint is not None:
        saved = load_totals(checkpoint)
        for name, value in asdict(saved).items():
            setattr(totals, name, getattr(totals, name) + value)
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:  # transformers would train one step more
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        raise RunFailed(
            f"training stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; continue "
            "with --resume"
        )


def write_results(
    trainer: Trainer,
    setting: Setting,
    directory: RunDirectory,
    recipe: Recipe,
    loaded: Loaded,
    before: dict,
) -> None:
    """Final model, model card, run.json and the held-out examples."""
    after = setting.heldout.measure(setting.student)
    answers = setting.heldout.examples(
        setting.student, setting.arguments.teacher.teacher_max_new_tokens
    )
    trainer.save_model(str(directory.final_model))
    record = run_record.build(
        recipe=recipe.resolved(),
        totals=setting.totals.summed(),
        heldout={"before": before["measured"], "after": after},
        data={"files": [asdict(report) for report in loaded.reports]},
        models={"teacher": setting.teacher.identity, "student": loaded.student.fingerprint},
        log_history=trainer.state.log_history,
    )
    logger.info("held out, after training:  %s", describe(after))
    if not PartialState().is_main_process:
        return
    # It pickles every training argument, and unpickling it would run code.
    (directory.final_model / "training_args.bin").unlink(missing_ok=True)
    directory.write_result("run.json", record)
    directory.write_result("heldout_examples.json", _examples(setting, before["answers"], answers))
    write_model_card(directory, json.loads(json.dumps(record)))


def _examples(setting: Setting, before: list[str], after: list[str]) -> dict:
    check = setting.heldout
    columns = zip(check.prompts, check.completions, before, after, strict=False)
    return {
        "examples": [
            {"id": p.id, "question": p.question, "teacher": c.text, "before": b, "after": a}
            for p, c, b, a in columns
        ]
    }
