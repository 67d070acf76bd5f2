"""Which pairs are trained on at which step: laid out before training begins, so that a resumed run, and
one on another number of processes, sees the same."""

import random
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice


@dataclass(frozen=True)
class Schedule:
    """A run of several iterations as one sequence of optimizer steps.

    Iteration k trains on the pairs of round k and of the `keep_rounds` − 1 rounds before it,
    `epochs_per_iteration` times over, each time in another order. The order wraps around to fill the last
    step of an iteration.

    Args:
        num_prompts: Pairs of one round.
        num_iterations: Rounds of generation, each followed by training.
        epochs_per_iteration: Passes over an iteration's pairs.
        keep_rounds: Rounds whose pairs an iteration trains on, the newest last.
        pairs_per_step: Of one optimizer step, over all processes.
        seed: Of the orders.
        max_steps: The run ends here if it is positive; the iteration then running is so much shorter.
    """

    num_prompts: int
    num_iterations: int
    epochs_per_iteration: int
    keep_rounds: int
    pairs_per_step: int
    seed: int
    max_steps: int = -1

    def rounds(self, iteration: int) -> range:
        """The rounds whose pairs an iteration trains on."""
        return range(max(0, iteration + 1 - self.keep_rounds), iteration + 1)

    def num_pairs(self, iteration: int) -> int:
        """Pairs of all passes of an iteration, before wrapping around."""
        return self.epochs_per_iteration * self.num_prompts * len(self.rounds(iteration))

    def repeated(self, iteration: int) -> int:
        """Pairs seen once more to fill the iteration's last step."""
        return -self.num_pairs(iteration) % self.pairs_per_step

    @cached_property
    def spans(self) -> list[range]:
        """The optimizer steps of each iteration, counted from 0 over the whole run."""
        spans, start = [], 0
        for iteration in range(self.num_iterations):
            pairs = self.num_pairs(iteration) + self.repeated(iteration)
            stop = start + pairs // self.pairs_per_step
            if self.max_steps > 0:
                stop = min(stop, self.max_steps)
            if stop > start:
                spans.append(range(start, stop))
            start = stop
        return spans

    @property
    def num_steps(self) -> int:
        return self.spans[-1].stop

    def iteration_at(self, step: int) -> int:
        """The iteration of a step; of the step after the last, the last."""
        return next((k for k, span in enumerate(self.spans) if step in span), len(self.spans) - 1)

    def rows(self) -> dict[str, list[int]]:
        """`round` and `prompt` of every pair in the order of training, whole steps only."""
        pairs = [pair for k in range(len(self.spans)) for pair in self._pairs(k)]
        pairs = pairs[: self.num_steps * self.pairs_per_step]
        return {"round": [pair[0] for pair in pairs], "prompt": [pair[1] for pair in pairs]}

    def _pairs(self, iteration: int) -> list[tuple[int, int]]:
        kept = [(n, prompt) for n in self.rounds(iteration) for prompt in range(self.num_prompts)]
        order = []
        for epoch in range(self.epochs_per_iteration):
            order += random.Random(f"{self.seed} {iteration} {epoch}").sample(kept, len(kept))
        return order + list(islice(cycle(order), self.repeated(iteration)))
