"""How many items go through a model at once: as asked for, or what the memory turns out to hold."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from medistill_trl.errors import RunFailed

logger = logging.getLogger(__name__)

# Writing is bound by reading the weights, once a token for the whole batch: 16 writes 1.4 times as fast as 8.
# Reading is bound by arithmetic, and padding is arithmetic too: 16 MedQA questions took a CPU's core 24 s in one
# batch and 7 s one by one.
WRITING_ON_CPU = 16
READING_ON_CPU = 1
ON_DEVICE = 64  # where halving begins
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class BatchSize:
    """A batch size that is halved, for good, whenever memory runs out.

    Args:
        size: Items in one forward.
        fixed: The user asked for this size: running out of memory is then an error.
    """

    size: int
    fixed: bool

    @classmethod
    def of(cls, asked: int | None, device: torch.device, writing: bool = False) -> "BatchSize":
        """The size asked for, or for None (auto) one to begin with on this device.

        Args:
            writing: Whether the model generates, or only reads what is there.
        """
        if asked is not None:
            return cls(asked, fixed=True)
        on_cpu = WRITING_ON_CPU if writing else READING_ON_CPU
        return cls(on_cpu if device.type == "cpu" else ON_DEVICE, fixed=False)

    def attempt(self, work: Callable[[int], Result]) -> Result:
        """`work(size)`, again at half the size for as long as memory runs out.

        Raises:
            RunFailed: not even one item fits, or the size is fixed.
        """
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if self.fixed or self.size == 1:
                    advice = "choose a smaller --batch_size, or " if self.size > 1 else ""
                    raise RunFailed(
                        f"out of memory at batch size {self.size}; {advice}load the models in fewer bits"
                    ) from error
                self.size //= 2
            torch.cuda.empty_cache()  # nothing on CPU
            logger.warning("out of memory; going on with batches of %d", self.size)

    def map(
        self, work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
    ) -> list[Result]:
        """`work` over all items, a batch at a time; results in the items' order."""
        results: list[Result] = []
        while len(results) < len(items):
            start = len(results)
            results += self.attempt(lambda size, start=start: work(items[start : start + size]))
        return results
