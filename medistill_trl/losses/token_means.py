"""Sums over tokens, collected between two lines of the log, and their means over all processes."""

import torch
from accelerate import Accelerator

# Sums over tokens, of `distillation_loss`, `policy_loss` and `value_loss` → names in the log; others keep theirs.
NAMES = {
    "agreed": "top1",
    "ce": "ce_nats",
    "correct": "mean_token_accuracy",
    "kl": "kl_nats",
    "divergence": "divergence_nats",
    "student_entropy": "student_entropy_nats",
    "teacher_entropy": "teacher_entropy_nats",
    "temperature": "temperature_mean",
    "clipped_low": "clipped_low_share",
    "clipped_high": "clipped_high_share",
    "entropy": "entropy_nats",
    "clipped": "clip_fraction",
    "approx_kl": "approx_kl_nats",
    "value_error": "value_loss",
    "value_clipped": "value_clip_fraction",
    "one_to_one": "one_to_one_share",
    "merged": "merged_share",
    "in_spans": "span_share",
}
COUNTS = ("tokens", "spans")  # divided by, not logged
# What is not a mean per token where the models compare spans, and the count it is a mean over.
PER = {
    "agreed": "one_to_one",
    "teacher_entropy": "one_to_one",
    "teacher_shared_mass": "one_to_one",
    "temperature": "spans",
    "clipped_low": "spans",
    "clipped_high": "spans",
}


class TokenMeans:
    """Collects sums over tokens; nothing is moved to the CPU until `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, sums: dict[str, torch.Tensor]) -> None:
        self._sums = add_sums(self._sums, sums)

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means per completion token over all processes, which all must ask; starts anew."""
        gathered = {
            name: accelerator.gather(value.reshape(1).to(accelerator.device))
            for name, value in sorted(self._sums.items())
        }
        self._sums = {}
        if not gathered:
            return {}
        totals = {name: values.sum().clamp_min(1) for name, values in gathered.items()}
        means = {}
        for name, values in gathered.items():
            if name.endswith("_min"):
                means[name] = values.min().item()
            elif name.endswith("_max"):
                means[name] = values.max().item()
            elif name not in COUNTS:
                count = totals.get(PER.get(name, "tokens"), totals["tokens"])
                means[NAMES.get(name, name)] = (values.sum() / count).item()
        return means


def add_sums(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Sums of both, by name; a minimum or maximum is that of both."""
    merge = {"_min": torch.minimum, "_max": torch.maximum}
    both = one | other
    for name in one.keys() & other.keys():
        both[name] = merge.get(name[-4:], torch.add)(one[name], other[name])
    return both
