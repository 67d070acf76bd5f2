"""What reaches the terminal: our messages, progress, and nothing a user cannot act on."""

import argparse
import logging
import os
import warnings

from medistill_trl.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """Refuses a command as the other commands do, by a `UserError`; its `prog` is what a user types."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; {self.prog} --help lists the options")


def set_up(main_process: bool) -> None:
    """Send our log to the terminal, of one process, and quiet the libraries' notes to developers."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("medistill_trl").setLevel(logging.INFO if main_process else logging.ERROR)
    # It misses an optional package that would speed up 4-bit on CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # GKD and PPO live in trl.experimental; constraints.txt pins the release they were tested with.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    # TRL 1.12 sets gradient_checkpointing under the name transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated")


def quiet_loading_bars() -> None:
    """Switch off the bars transformers and datasets draw while loading; downloads keep theirs."""
    import datasets
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # the call above switches these off too
    datasets.disable_progress_bars()
