"""Everything a method may use to build its trainer, loaded and checked."""

from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from transformers import PreTrainedModel
from trl import SFTConfig

from medistill_trl.arguments import DataArguments, RunArguments, StudentArguments, TeacherArguments
from medistill_trl.checkpoints import Totals
from medistill_trl.completion_store import CompletionStore
from medistill_trl.data import Prompt
from medistill_trl.heldout import HeldoutCheck
from medistill_trl.prompts import PromptFormat
from medistill_trl.run_directory import RunDirectory
from medistill_trl.teacher import Completion, Sampling, Teacher
from medistill_trl.teacher_logits import (
    Kept,
    Producer,
    TeacherLogits,
    in_batches,
    read_by,
    teacher_side,
)


@dataclass(frozen=True)
class Arguments:
    """A recipe as typed objects. `training` is the method's own config, an extension of TRL's."""

    run: RunArguments
    student: StudentArguments
    teacher: TeacherArguments
    data: DataArguments
    training: SFTConfig


@dataclass
class Setting:
    """The loaded pair, the data and the stores of one run.

    Args:
        arguments: The recipe.
        student: Model to train, LoRA-wrapped if the recipe says so.
        form: The student's prompt format; its tokenizer is the student's.
        teacher: The frozen teacher.
        store: Completions kept on disk.
        train_prompts: What the student trains on.
        heldout: The check before and after training, with the teacher's validation completions.
        totals: Running count of what the run uses; resumed with it.
        used: The stored completions this launch has asked for, whoever drew them, by question, sampling and sample.
            A resumed run asks for all of them again.
    """

    arguments: Arguments
    student: PreTrainedModel
    form: PromptFormat
    teacher: Teacher
    store: CompletionStore
    train_prompts: list[Prompt]
    heldout: HeldoutCheck
    totals: Totals
    used: dict[tuple[str, Sampling, int], Completion] = field(default_factory=dict)

    @property
    def sampling(self) -> Sampling:
        return sampling_of(self.arguments.teacher)

    @property
    def run_directory(self) -> RunDirectory:
        """Where a method may leave results of its own; the trainer's folder lies in it."""
        return RunDirectory(Path(self.arguments.training.output_dir).parent)

    def stored_completions(self, samples: int) -> list[list[Completion]]:
        """The teacher's completions of every training prompt; it writes only what the store lacks.

        Args:
            samples: Completions of each prompt.
        """
        questions = [prompt.question for prompt in self.train_prompts]
        return self.draw(questions, self.sampling, samples, "teacher completions")

    def draw(
        self, questions: list[str], sampling: Sampling, samples: int, label: str
    ) -> list[list[Completion]]:
        """The teacher's completions of any questions, by way of the store.

        Args:
            label: Of the progress bar.
        """
        before, start = self.teacher.generated_tokens, monotonic()
        drawn = self.store.draw(
            self.teacher,
            [self.teacher.form.render(question) for question in questions],
            sampling,
            samples,
            self.arguments.teacher.teacher_batch_size,
            label,
        )
        self.totals.generated_teacher += self.teacher.generated_tokens - before
        self.totals.drawn_teacher += self.teacher.generated_tokens - before
        self.totals.seconds_drawing += monotonic() - start
        for question, group in zip(questions, drawn, strict=True):
            self.used |= {(question, sampling, index): c for index, c in enumerate(group)}
        return drawn

    def teacher_logits(self, examples: list[dict], top_k: int, temperature: float) -> TeacherLogits:
        """What is kept of the teacher's distributions on encoded pairs; it reads only those that are not kept yet.

        Args:
            examples: Each gets its key, as `top_k`.
            top_k: Tokens kept of each distribution.
            temperature: Of the loss.
        """
        start = monotonic()
        kept = Kept.of(self.teacher.identity, self.heldout.shared, top_k, temperature)
        logits = TeacherLogits(logits_folder(self.store), kept)
        keys = logits.fill(examples, self._producer(kept))
        for example, key in zip(examples, keys, strict=True):
            example["top_k"] = key
        self.totals.seconds_drawing += monotonic() - start
        return logits

    def _producer(self, kept: Kept) -> Producer:
        """The teacher as what makes distributions."""
        if not self.teacher.gives_logits:
            return lambda examples: self.teacher.top_log_probs(
                [teacher_side(example) for example in examples], kept.top_k, kept.vocab_size
            )
        return in_batches(  # its model, which may only now be loaded
            lambda batch: read_by(self.teacher.model, kept, batch),
            self.arguments.teacher.teacher_batch_size,
        )


def logits_folder(store: CompletionStore) -> Path:
    """Where what is kept of teachers' logits lies: beside the completions."""
    return store.path.with_suffix(".logits")


def sampling_of(args: TeacherArguments) -> Sampling:
    return Sampling(
        max_new_tokens=args.teacher_max_new_tokens,
        temperature=args.teacher_temperature,
        top_p=args.teacher_top_p,
        top_k=args.teacher_top_k,
    )
