"""What models answer, drawn once: completions of both models by way of the completion store."""

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import PartialState

from eval.batching import BatchSize
from eval.item_store import ItemStore
from eval.options import Options
from eval.subjects import Subject
from medistill_trl.completion_store import CompletionStore
from medistill_trl.teacher import Completion, Sampling, complete
from medistill_trl.writer import Writer

STORE = "completions.sqlite"  # in the folder of the stored results


@dataclass
class _Writer(Writer):
    """A subject as the completion store asks it; its weights are loaded for what is not stored."""

    subject: Subject

    @property
    def identity(self) -> str:
        return self.subject.fingerprint

    def complete(
        self, prompts: Sequence[str], sampling: Sampling, seed: int = 0
    ) -> list[Completion]:
        return complete(self.subject.model, self.subject.form, prompts, sampling, seed)


def draw_answers(
    subject: Subject,
    prompts: Sequence[str | None],
    sampling: Sampling,
    batches: BatchSize,
    store: ItemStore,
    label: str,
) -> list[Completion]:
    """One completion of each rendered prompt, from the store where it has them.

    A draw's seed comes from what addresses it, so a sampled answer is drawn once and stays.

    Args:
        prompts: None for a question that is too long for the model: its answer is empty.
        batches: How many prompts are in one batch.
        label: Of the progress bar.
    """
    completions = CompletionStore(store.folder / STORE)
    writer = _Writer(subject)
    asked = [prompt for prompt in prompts if prompt is not None]
    drawn = iter(
        batches.attempt(lambda size: completions.draw(writer, asked, sampling, 1, size, label))
    )
    unasked = Completion("", [], finished=True)
    return [unasked if prompt is None else next(drawn)[0] for prompt in prompts]


def writing_batches(options: Options) -> BatchSize:
    """For `draw_answers`; kept over several calls, so that memory runs out once."""
    return BatchSize.of(options.batch_size, PartialState().device, writing=True)
