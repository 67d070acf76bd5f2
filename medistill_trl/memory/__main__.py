"""`medistill plan`: the memory of a recipe, from the models' configs alone.

    python -m medistill_trl.memory RECIPE [OVERLAY ...] [--vram GB] [--config_file X] [--KEY VALUE ...]

Neither weights nor tokenizers nor data are looked at; a config comes from a folder with a config.json or from the hub.
"""

import argparse
import logging
import os
import sys

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from medistill_trl.errors import UserError


def main(words: list[str]) -> None:
    """The command.

    Raises:
        UserError: a recipe that is refused, a model that is not there, a device that is too small to name.
    """
    parser = argparse.ArgumentParser(prog="medistill plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--vram", type=float)
    parser.add_argument("--config_file")
    given, rest = parser.parse_known_args(words)
    from medistill_trl import recipe

    checked = recipe.load(rest)  # refused before anything heavy is imported
    from medistill_trl import console, launch, methods, model_source
    from medistill_trl.memory import weightless
    from medistill_trl.memory.plan import Planner, usable
    from medistill_trl.memory.tables import micro_batches, to_text
    from medistill_trl.pipeline import build_arguments
    from medistill_trl.run_directory import RunDirectory

    if given.vram is not None and usable(given.vram) <= 0:
        raise UserError(f"--vram: {given.vram:g} GB hold nothing beside the GPU's own context")
    console.set_up(main_process=True)
    method = methods.load(checked.values["method"])
    launcher = ["--config_file", given.config_file] if given.config_file else []
    use_cpu = launch.read_request(launcher).use_cpu
    arguments = build_arguments(checked, method, RunDirectory(checked.output_dir), use_cpu)
    s, t = arguments.student, arguments.teacher
    remote = arguments.training.trust_remote_code
    student = model_source.find_config(s.student_model, s.student_revision, remote)
    if s.student_keep_layers is not None:
        student = weightless.at_depth(student, len(s.student_keep_layers))
    teacher = model_source.find_config(t.teacher_model, t.teacher_revision, remote)
    device_type = "cpu" if use_cpu else "cuda"
    with weightless.quiet():
        keeps = method.keeps_teacher(arguments)
        planner = Planner(
            arguments, student, teacher, method.memory, device_type, keeps_teacher=keeps
        )
        print(_headline(arguments, planner, device_type))
        print(to_text(planner.plan()))
        print(micro_batches(planner, given.vram))


def _headline(arguments, planner, device_type: str) -> str:
    training, lengths = arguments.training, planner.lengths
    checkpointing = "with" if training.gradient_checkpointing else "without"
    return (
        f"# memory plan, per device ({device_type}): {arguments.run.method}, {arguments.teacher.teacher_model} → "
        f"{arguments.student.student_model}\n"
        f"micro-batches of {training.per_device_train_batch_size} examples of {lengths.prompt} + "
        f"{lengths.completion} tokens, {checkpointing} gradient checkpointing"
    )


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"\nmedistill_trl: {error}\n", file=sys.stderr)
        sys.exit(error.exit_code)
