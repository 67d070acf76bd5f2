"""Train what a recipe describes:

    accelerate launch recipes/run.py recipes/sft.yaml [overlay.yaml ...] [--key value ...]

Later files win over earlier ones, flags win over files. `--dry_run` checks everything and stops before
training, `--resume` continues an unfinished run.
"""

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from medistill_trl import console, disk, importing, launch, recipe
from medistill_trl.errors import StartAgain, UserError


def main(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    launch.die_with_launcher()
    launch.end_on_signals()
    if launch.restarted() and "--resume" not in arguments:
        arguments = [*arguments, "--resume"]
    try:
        # Before torch is imported: a wrong recipe is refused at once.
        checked = recipe.load(arguments)
        main_process = int(os.environ.get("RANK", "0")) == 0
        console.set_up(main_process)
        for warning in checked.warnings:
            logging.getLogger("medistill_trl").warning("warning: %s", warning)

        with importing.many_modules():
            from medistill_trl import pipeline

        folders = (checked.output_dir, Path(checked.values["completion_store"]).parent)
        with disk.explained(*folders, how_to_go_on="continue with --resume"):
            directory = pipeline.run(checked)
            if directory is not None and main_process:
                from eval.plots import training_curves
                from eval.report import write_report

                training_curves(directory)
                report = write_report(directory.path)
                directory.mark_complete()
                print(f"\nfinished: {directory.path}\nreport:   {report}")
    except StartAgain as error:
        launch.start_again(error, checked.values["resume"])
    except UserError as error:
        launch.leave(error)


if __name__ == "__main__":
    main(sys.argv[1:])
