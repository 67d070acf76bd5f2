"""What models answer, drawn once: completions of both models by way of the completion store."""

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import PartialState

from eval.batching import BatchSize
from eval.item_store import ItemStore
from eval.subjects import Subject
from medistill_trl.completion_store import CompletionStore
from medistill_trl.teacher import Completion, Sampling, complete

STORE = "completions.sqlite"  # in the folder of the stored results


@dataclass
class _Writer:
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
    prompts: list[str],
    sampling: Sampling,
    batch_size: int | None,
    store: ItemStore,
    label: str,
) -> list[Completion]:
    """One completion of each rendered prompt, from the store where it has them.

    A draw's seed comes from what addresses it, so a sampled answer is drawn once and stays.

    Args:
        batch_size: Prompts in one batch; None for as many as the memory holds.
        label: Of the progress bar.
    """
    completions = CompletionStore(store.folder / STORE)
    writer = _Writer(subject)
    drawn = BatchSize.of(batch_size, PartialState().device, writing=True).attempt(
        lambda size: completions.draw(writer, prompts, sampling, 1, size, label)
    )
    return [samples[0] for samples in drawn]
