"""Whoever answers prompts for the completion store: a model here, a server elsewhere."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which needs this module
    from medistill_trl.teacher import Completion, Sampling


class Writer(ABC):
    """Answers rendered prompts.

    Attributes:
        identity: Names the exact model; part of every stored completion's key.
    """

    identity: str

    @property
    def writes_with_others(self) -> bool:
        """Whether all processes must answer equally often, see `sharding`."""
        return False

    @abstractmethod
    def complete(
        self, prompts: Sequence[str], sampling: "Sampling", seed: int = 0
    ) -> list["Completion"]:
        """One completion of each prompt, in their order.

        Args:
            seed: Of the draw, when sampling.
        """

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: "Sampling", batch_size: int
    ) -> Iterator[list[tuple[int, "Completion"]]]:
        """Completions of many prompts as they are finished, each with its prompt's place.

        Here in batches of prompts that lie side by side, with the seed of the first.

        Args:
            prompts: Longest first.
            seeds: One for each prompt.
            batch_size: Prompts answered at a time, at most.
        """
        for places in batches(prompts, batch_size):
            asked = [prompts[place] for place in places]
            completions = self.complete(asked, sampling, seeds[places[0]])
            yield list(zip(places, completions, strict=True))


def batches(prompts: Sequence[str], size: int) -> list[list[int]]:
    """Places of at most `size` prompts, none of them less than half as long as the longest beside it, to which it
    is padded.

    Args:
        prompts: Longest first.
    """
    found: list[list[int]] = []
    for place, prompt in enumerate(prompts):
        fits = found and len(found[-1]) < size
        if fits and 2 * len(prompt) >= len(prompts[found[-1][0]]):
            found[-1].append(place)
        else:
            found.append([place])
    return found
