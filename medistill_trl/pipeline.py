"""One training run, from a checked recipe to a run directory, as a straight line."""

import logging
import os
import pickle  # nosec B403: only its error
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerState
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from trl import TrlParser

from medistill_trl import console, engines, launch, methods, out_of_memory, trackers
from medistill_trl.arguments import SHARED
from medistill_trl.budget import BudgetCallback
from medistill_trl.checkpoints import (
    CheckpointCallback,
    Totals,
    choose,
    files_of,
    load_totals,
    resume_in_same_dtypes,
)
from medistill_trl.divergence import DivergenceWatch
from medistill_trl.dry_run import print_plan
from medistill_trl.errors import Interrupted, RunFailed, UserError, first_line
from medistill_trl.guards import FiniteGuard, kept_for_a_look
from medistill_trl.heldout import HeldoutCallback
from medistill_trl.inputs import Loaded, identity, load_inputs, load_models
from medistill_trl.methods import Method
from medistill_trl.on_demand_teacher import OnDemandTeacher
from medistill_trl.recipe import Recipe
from medistill_trl.results import measure_before, write_results
from medistill_trl.run_directory import RunDirectory
from medistill_trl.setting import Arguments, Setting
from medistill_trl.stopping import LastBoundary, StopCallback, StopRequest
from medistill_trl.teacher_server import ServerLost
from medistill_trl.token_bytes import TokenBytes
from medistill_trl.vocabulary import require_shared_vocabulary, shared_vocabulary

logger = logging.getLogger(__name__)

# Not for a recipe to choose: NaN must not be filtered out of the log, and with DDP looking for unused
# parameters costs time where there are none.
FORCED = {"logging_nan_inf_filter": False, "ddp_find_unused_parameters": False}


def run(recipe: Recipe) -> RunDirectory | None:
    """Train what a recipe describes.

    Returns:
        The run directory, with everything but pictures and COMPLETE; None after a dry run.

    Raises:
        UserError: what the user can mend, before or during training.
        StartAgain: it was too large for the memory, and will be smaller the next time.
    """
    console.quiet_loading_bars()
    method = methods.load(recipe.values["method"])
    directory = RunDirectory(recipe.output_dir)
    asked = launch.requested()
    arguments = build_arguments(recipe, method, directory, asked.use_cpu, asked.engine)
    state = PartialState()
    launch.check_processes(asked, state.num_processes, engines.in_accelerates_words(state))
    engines.check(method, arguments, engines.engine_of(arguments, state))
    unset_hf_deepspeed_config()  # or every from_pretrained would share out what it loads
    _use_all_cores(state)
    if not arguments.run.dry_run:
        directory.check(recipe)
    loaded = check_inputs(method, arguments)
    if arguments.run.dry_run:
        print_plan(recipe, method, arguments, loaded)
        state.destroy_process_group()
        return None
    inputs = identity(arguments, loaded)
    if arguments.run.resume:
        directory.check_same_inputs(inputs)
    training = arguments.training
    trackers.start(training.report_to, training.project, directory.path, state.is_main_process)
    with (
        ExitStack() as held,
        out_of_memory.recorded(directory, arguments),
        kept_for_a_look(directory.results),
    ):
        setting = load_models(arguments, loaded, method.keeps_teacher(arguments))
        state.wait_for_everyone()  # nobody starts the folder while another still checks it
        if state.is_main_process:
            held.enter_context(directory.lock())
            directory.check(recipe)  # once more, now that nobody else can change it
            directory.start(recipe, inputs)
        state.wait_for_everyone()
        before = measure_before(setting, directory, loaded)
        trainer = build_trainer(method, setting)
        checkpoint = find_checkpoint(directory, method, trainer) if arguments.run.resume else None
        train(trainer, setting.totals, checkpoint)
        write_results(trainer, setting, directory, recipe, loaded, before)
    state.wait_for_everyone()
    state.destroy_process_group()  # exiting with it alive aborts the process
    return directory


def check_inputs(method: Method, arguments: Arguments) -> Loaded:
    """Everything but weights, and whether the method can serve the pair.

    Raises:
        UserError: it cannot, or something is missing.
    """
    white_box = method.teacher_access == "white_box"
    if white_box and arguments.teacher.teacher_backend == "server":
        _check_served(method, arguments)
    loaded = load_inputs(arguments)
    if white_box:
        _check_tokenizers(method, arguments, loaded)
    method.check(arguments, loaded)
    return loaded


def _check_served(method: Method, arguments: Arguments) -> None:
    otherwise = (
        "teacher_backend: local, or take a method that needs only the teacher's words: "
        f"{', '.join(methods.names('black_box'))}"
    )
    if method.served_with is None:
        raise UserError(
            f"teacher_backend: {method.name} needs the teacher's logits or inner states while it trains, which no server "
            f"gives; set {otherwise}"
        )
    training = vars(arguments.training)
    wrong = [
        f"{key}: {value}, got {training[key]} ({why})"
        for key, (value, why) in method.served_with.items()
        if training[key] != value
    ]
    if wrong:
        raise UserError(
            f"teacher_backend: {method.name} can do with a server if it has {'; and '.join(wrong)}. Set that, or {otherwise}"
        )


def _check_tokenizers(method: Method, arguments: Arguments, loaded: Loaded) -> None:
    pair = loaded.student_form.tokenizer, loaded.teacher_form.tokenizer
    if not method.across_tokenizers or arguments.teacher.cross_tokenizer == "refuse":
        require_shared_vocabulary(
            *pair, method.name, methods.names("black_box"), method.across_tokenizers
        )
    elif shared_vocabulary(*pair) is None:
        for tokenizer in pair:
            TokenBytes.of(tokenizer)  # or it refuses
        logger.info("the tokenizers differ: the models are compared over spans of the same text")


def build_arguments(
    recipe: Recipe,
    method: Method,
    directory: RunDirectory,
    use_cpu: bool,
    engine: str | None = None,
) -> Arguments:
    """Typed objects from a checked recipe, built by TRL's parser.

    Building them starts the process group. With several processes and no accelerator that succeeds
    only if `use_cpu` says so.
    """
    parser = TrlParser((*SHARED, method.config))
    values = {
        "project": trackers.PROJECT,
        **recipe.values,
        **FORCED,
        "run_name": directory.path.name,  # of all methods side by side, in a tracker
        "output_dir": str(directory.checkpoints),
    }
    if recipe.values["resume"]:
        values |= out_of_memory.Changes.of(directory).values
    values |= engines.values_without_accelerator(use_cpu, engine)
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


def build_trainer(method: Method, setting: Setting) -> Trainer:
    """The method's trainer, with what every run needs."""
    setting.totals.start()  # drawing stored completions belongs to what the run costs
    try:
        trainer = method.build(setting)
    except (ValueError, ImportError) as error:  # TRL and Transformers judge their own keys
        raise UserError(f"recipe: the {method.name} trainer refuses it: {error}") from error
    resume_in_same_dtypes(trainer)
    on_demand = isinstance(setting.teacher, OnDemandTeacher)
    if on_demand:  # the trainer does without, see `Method.keeps_teacher`
        setting.teacher.release()
    reads_student = not on_demand and setting.heldout.shared is not None
    trainer.add_callback(FiniteGuard(trainer, setting.teacher.model if reads_student else None))
    trainer.add_callback(DivergenceWatch(setting.arguments.run, method.loss_falls))
    trainer.add_callback(CheckpointCallback(setting.totals))
    trainer.add_callback(HeldoutCallback(setting.heldout, trainer))
    trainer.add_callback(BudgetCallback(setting.arguments.run, setting.totals))
    return trainer


def find_checkpoint(directory: RunDirectory, method: Method, trainer: Trainer) -> Path | None:
    """The newest valid checkpoint; what is invalid is named and moved aside."""

    def needed(step: int) -> set[str]:
        return files_of(trainer, step) | method.checkpoint_files(trainer, step)

    checkpoint, passed_over = choose(directory.checkpoints, needed)
    for line in passed_over:
        logger.warning("%s", line)
    logger.info("resuming from %s", checkpoint or "the beginning: no whole checkpoint was saved")
    return checkpoint


def train(trainer: Trainer, totals: Totals, checkpoint: Path | None) -> None:
    """Train to the end, or to a signal.

    Args:
        checkpoint: To go on from.

    Raises:
        Interrupted: a signal came, and a checkpoint was saved.
        RunFailed: training stopped early; no result is written then.
        ServerLost: the teacher's server has; the last whole step is saved, if there is one process.
    """
    if checkpoint is not None:
        totals.add(load_totals(checkpoint))
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:  # transformers would train one step more
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            # DeepSpeed's engine starts with training: the model is whole and saved as any other.
            trainer.is_deepspeed_enabled = False
            return
    with StopRequest() as request:
        trainer.add_callback(StopCallback(request))
        boundary = LastBoundary()
        trainer.add_callback(boundary)
        try:
            with engines.reading_no_code(trainer.is_deepspeed_enabled):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except ServerLost:
            boundary.save(trainer)
            raise
        except pickle.UnpicklingError as error:
            # Torch reads tensors and plain values, and runs no code.
            raise UserError(
                f"{checkpoint}: holds what training never saved ({first_line(error)}), and nothing of it was run; do not "
                "trust this folder: remove the checkpoint and resume from the one before it"
            ) from error
    totals.lap()
    if request.number is not None:  # after the last boundary of a step
        raise Interrupted("stopped after the last step; continue with --resume", request.number)
    if trainer.state.global_step < trainer.state.max_steps:
        raise RunFailed(
            f"training stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; continue "
            "with --resume"
        )
