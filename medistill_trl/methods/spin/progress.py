"""What an iteration came to, measured on its newest pairs with the weights it ended with.

Measured anew at the end rather than averaged on the way, so that a resumed run finds the same numbers.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from medistill_trl.heldout import compare_logits
from medistill_trl.methods.spin.reference import PreviousIterate
from medistill_trl.methods.spin.rounds import Pair
from medistill_trl.run_directory import RunDirectory
from medistill_trl.teacher import completion_logits

FILE = "spin_iterations.json"


@dataclass
class Sums:
    """Sums over pairs.

    Args:
        pairs: That were measured.
        margin: Σ of the rewards' differences.
        preferred: Pairs with a positive margin.
        kl: Σ KL(policy ‖ start policy) over the tokens of y⁻, nats.
        kl_tokens: Tokens of these; 0 if it was not measured.
    """

    pairs: int = 0
    margin: float = 0.0
    preferred: int = 0
    kl: float = 0.0
    kl_tokens: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            *(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True))
        )

    def means(self) -> dict[str, float | int | None]:
        """For the record; None where nothing was measured."""
        return {
            "measured_pairs": self.pairs,
            "margin": self.margin / self.pairs if self.pairs else None,
            "accuracy": self.preferred / self.pairs if self.pairs else None,
            "kl_to_start_nats": self.kl / self.kl_tokens if self.kl_tokens else None,
        }


def measure(
    student: PreTrainedModel, pairs: list[Pair], previous: PreviousIterate | None, beta: float
) -> dict[str, float | int | None]:
    """Margin and preference accuracy of the pairs, and the distance from the start policy on y⁻.

    Every process measures its share and all get the means. Without its adapter a student is the policy
    training began with; where all weights are trained that one is gone, and the distance is None.

    Args:
        student: The policy; its training mode is restored.
        previous: None for a loss without a reference.
        beta: Scale of the rewards.
    """
    state = PartialState()
    was_training = student.training
    student.eval()
    mine = tqdm(
        pairs[state.process_index :: state.num_processes],
        desc="margins",
        unit="pair",
        disable=not state.is_main_process,
    )
    total = sum((_measure_pair(student, pair, previous, beta) for pair in mine), Sums())
    student.train(was_training)
    return sum(gather_object([total]), Sums()).means()


@torch.no_grad()
def _measure_pair(
    student: PreTrainedModel, pair: Pair, previous: PreviousIterate | None, beta: float
) -> Sums:
    logits = completion_logits(student, pair.prompt_ids, pair.rejected_ids)
    ratio = _log_prob(student, pair.prompt_ids, pair.chosen_ids) - _sum(logits, pair.rejected_ids)
    if previous is not None:
        with previous.in_place() as model:
            ratio -= _log_prob(model, pair.prompt_ids, pair.chosen_ids)
            ratio += _log_prob(model, pair.prompt_ids, pair.rejected_ids)
    sums = Sums(pairs=1, margin=beta * ratio, preferred=int(ratio > 0))
    if isinstance(student, PeftModel):
        with student.disable_adapter():
            start = completion_logits(student, pair.prompt_ids, pair.rejected_ids)
        # Between whole distributions, so that it is never negative.
        compared = compare_logits(
            start, logits, torch.tensor(pair.rejected_ids, device=start.device)
        )
        sums.kl, sums.kl_tokens = compared.kl, compared.tokens
    return sums


def _log_prob(model: nn.Module, prompt_ids: list[int], completion_ids: list[int]) -> float:
    return _sum(completion_logits(model, prompt_ids, completion_ids), completion_ids)


def _sum(logits: torch.Tensor, ids: list[int]) -> float:
    target = torch.tensor(ids, device=logits.device)
    return -F.cross_entropy(logits.float(), target, reduction="sum").item()


def write_record(directory: RunDirectory, record: dict) -> None:
    """Put an iteration's record behind those of the iterations before it, in results/."""
    known = (
        directory.read_result(FILE) if (directory.results / FILE).exists() else {"iterations": []}
    )
    before = [r for r in known["iterations"] if r["iteration"] < record["iteration"]]
    directory.write_result(FILE, {"iterations": [*before, record]})
