"""How much of the completions is compared where two tokenizers differ, and a warning where it is little."""

import logging

import torch

from medistill_trl.prompts import IGNORED

logger = logging.getLogger(__name__)

# In the log. Logit-KD's are of tokens that both vocabularies have, the other methods' of tokens in spans.
SHARES = ("one_to_one_share", "teacher_shared_mass", "span_share")


class Coverage:
    """Warns once.

    Args:
        minimum: Of every share, from 0 to 1.
        says: Whether this process is the one that warns.
    """

    def __init__(self, minimum: float, says: bool):
        self.minimum = minimum
        self.says = says

    def check(self, means: dict[str, float]) -> None:
        """Look at what goes into the log, of which the shares may be a part."""
        low = {name: means[name] for name in SHARES if means.get(name, 1) < self.minimum}
        if not low or not self.says:
            return
        self.says = False
        found = " and ".join(f"{name} {value:.2f}" for name, value in low.items())
        logger.warning(
            "the two tokenizers have little in common: %s, below min_coverage %g. Little of what the teacher says is "
            "compared; a method that passes text may serve this pair as well",
            found,
            self.minimum,
        )


def span_counts(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums for the log: the student's completion tokens of a batch of span pairs, and those in spans."""
    spans_G4 = batch["spans"]
    return {
        "tokens": (batch["labels"] != IGNORED).sum().float(),
        "in_spans": (spans_G4[:, 1] - spans_G4[:, 0]).sum().float(),
    }
