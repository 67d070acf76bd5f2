"""Sums over tokens, collected between two lines of the log, and their means over all processes."""

import torch
from accelerate import Accelerator

# Sums over tokens, of `distillation_loss`, `policy_loss` and `value_loss` → names in the log; others keep theirs.
NAMES = {
    "agreed": "top1",
    "ce": "ce_nats",
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
}


class TokenMeans:
    """Collects sums over tokens; nothing is moved to the CPU until `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, sums: dict[str, torch.Tensor]) -> None:
        for name, value in sums.items():
            if name not in self._sums:
                self._sums[name] = value
            elif name.endswith("_min"):
                self._sums[name] = torch.minimum(self._sums[name], value)
            elif name.endswith("_max"):
                self._sums[name] = torch.maximum(self._sums[name], value)
            else:
                self._sums[name] = self._sums[name] + value

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means per completion token over all processes, which all must ask; starts anew."""
        gathered = {
            name: accelerator.gather(value.reshape(1).to(accelerator.device))
            for name, value in sorted(self._sums.items())
        }
        self._sums = {}
        if not gathered:
            return {}
        tokens = gathered.pop("tokens").sum().clamp_min(1)
        means = {}
        for name, values in gathered.items():
            if name.endswith("_min"):
                means[name] = values.min().item()
            elif name.endswith("_max"):
                means[name] = values.max().item()
            else:
                means[NAMES.get(name, name)] = (values.sum() / tokens).item()
        return means
