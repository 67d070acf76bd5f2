"""A rollout: samples of the student with what was known of each token when they were drawn.

Kept are numbers per token, never logits.

Shapes: B samples of a micro-batch, L tokens of the longest with its prompt, C completion tokens of a sample, N of a
micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from medistill_trl.prompts import IGNORED
from medistill_trl.rewards import Rewards

# Of one sample: `input_ids` and `labels`, (L,), and by name what is kept of its tokens, (C,).
Sampled = dict[str, torch.Tensor]
PADDED = ("input_ids", "labels")


@dataclass(frozen=True)
class Scored:
    """What student and teacher make of samples.

    Args:
        examples: From `encode_sample`.
        log_probs: log π of each token, (C,) each.
        values: V of each token, (C,) each, in the value head's units.
        rewards: The teacher's.
        log_ratios: By name, log π − log p of another model, (C,) each.
    """

    examples: list[dict[str, list[int]]]
    log_probs: list[torch.Tensor]
    values: list[torch.Tensor]
    rewards: Rewards
    log_ratios: dict[str, list[torch.Tensor]]


def sampled(example: dict[str, list[int]], **kept: torch.Tensor) -> Sampled:
    """One sample of a rollout, on the CPU.

    Args:
        example: From `encode_sample`.
        kept: (C,) each.
    """
    tokens = {name: torch.tensor(example[name]) for name in PADDED}
    return tokens | {name: values.detach().cpu() for name, values in kept.items()}


def micro_batch(
    samples: Sequence[Sampled], pad_token_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Samples for one forward.

    Returns:
        `input_ids`, `attention_mask` and `labels`, (B, L), padded on the right, and what is kept of the tokens,
        (N,) each, in the order in which `completion_states` reads them.
    """
    ids = [sample["input_ids"] for sample in samples]
    batch = {
        "input_ids": pad_sequence(ids, True, pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
        "labels": pad_sequence([sample["labels"] for sample in samples], True, IGNORED),
    }
    for name in samples[0]:
        if name not in PADDED:
            batch[name] = torch.cat([sample[name] for sample in samples])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def order(num_samples: int, epoch: int, seed: int) -> list[int]:
    """The samples' order in one of PPO's epochs over a rollout.

    The first is as they were drawn: the micro-batches are then those their old log-probabilities were taken in, and
    the ratio is exactly 1 before the first step. Padding and neighbours may change the rounding.

    Args:
        seed: Of the rollout on this process.
    """
    if epoch == 0:
        return list(range(num_samples))
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(num_samples, generator=generator).tolist()
