"""The ten methods, one module (or folder) each.

A method module defines one `*Config` dataclass (its delta over the TRL config), a subclass of its TRL
trainer, and `METHOD`. Nothing is registered anywhere else: the file's name is the method's name.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from medistill_trl.errors import UserError
from medistill_trl.recipe import methods

if TYPE_CHECKING:
    from transformers import Trainer
    from trl import SFTConfig

    from medistill_trl.data import Prompt
    from medistill_trl.inputs import Loaded
    from medistill_trl.memory.losses import CrossEntropy
    from medistill_trl.setting import Arguments, Setting


def _plain_example(config: "SFTConfig", prompt: "Prompt") -> tuple[str, str]:
    return prompt.question, prompt.reference


def _cross_entropy() -> "CrossEntropy":
    from medistill_trl.memory.losses import CrossEntropy

    return CrossEntropy()


def _any_pair(arguments: "Arguments", loaded: "Loaded") -> None:
    pass


def _always(arguments: "Arguments") -> bool:
    return True


def _no_files(trainer: "Trainer", step: int) -> set[str]:
    return set()


@dataclass(frozen=True)
class Method:
    """What the pipeline needs to know of a method.

    Args:
        name: As in the recipe.
        config: Dataclass of the method's training arguments, extending a TRL config.
        teacher_access: `black_box` needs text only and works across tokenizers; `white_box` needs the
            teacher's logits or hidden states for the student's tokens.
        build: From everything that is loaded to a trainer ready to train.
        paper: Where the objective comes from.
        memory: What it does with a micro-batch, for the memory plan; by default SFT's cross-entropy.
        example: From the method's config and a prompt to what the teacher is asked, and what the student
            would learn if the teacher wrote the reference; for the dry run.
        learns: What the student trains on, in a few words for the dry run.
        loss_falls: Whether a loss that rises means that training goes wrong; the divergence watch asks.
        check: Refuses, with a `UserError`, what the recipe asks of this pair and cannot be; before any
            weights are loaded, in a dry run too.
        across_tokenizers: A white-box method that can compare models of different tokenizers too, over
            spans (see `spans`).
        engines: That it is proven on beside DDP; names of `engines`. None before a test has shown it; FSDP2,
            which no machine here can start, warns.
        engine_note: Why not on the others, for the message that refuses them.
        shards_teacher: All processes ask the teacher equally often and let it finish, so that its weights can
            be shared out.
        keeps_teacher: Whether training asks the teacher's model. Where it does not, the model is loaded only if a
            store lacks something, and let go of before training.
        served_with: Settings with which a white-box method can do with what a server gives of the teacher, its
            likeliest tokens and the mass of all others: key → the value it must have, and why. None: there are none.
        checkpoint_files: From the trainer and a step to what its checkpoint after that step must hold besides what
            every trainer's does, as patterns of names: one whose manifest lacks some of it is not resumed.
    """

    name: str
    config: type
    teacher_access: Literal["black_box", "white_box"]
    build: "Callable[[Setting], Trainer]"
    paper: str
    memory: "CrossEntropy" = field(default_factory=_cross_entropy)
    example: "Callable[[SFTConfig, Prompt], tuple[str, str]]" = _plain_example
    learns: str = "what the teacher writes; here the reference stands in for it"
    loss_falls: bool = True
    check: "Callable[[Arguments, Loaded], None]" = _any_pair
    across_tokenizers: bool = False
    engines: tuple[str, ...] = ()
    engine_note: str = ""
    shards_teacher: bool = False
    keeps_teacher: "Callable[[Arguments], bool]" = _always
    served_with: "dict[str, tuple[object, str]] | None" = None
    checkpoint_files: "Callable[[Trainer, int], set[str]]" = _no_files


def load(name: str) -> Method:
    """Import `medistill_trl.methods.<name>` and return its `METHOD`.

    Raises:
        UserError: no such method. An error inside the module is not caught.
    """
    if name not in methods():
        raise UserError(f"method {name!r} does not exist; one of {', '.join(methods())}")
    return importlib.import_module(f"{__name__}.{name}").METHOD


def names(teacher_access: str) -> list[str]:
    """Methods with this kind of teacher access; imports them all."""
    return [name for name in methods() if load(name).teacher_access == teacher_access]
