"""The trainer of best-of-N distillation.

Shapes: G prompts of the window, N samples of each, B = samples of a process, F fresh samples of the student
beside those of the anchor.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
from accelerate.utils import gather_object

from medistill_trl.checkpoints import adapter_files
from medistill_trl.losses.best_of_n import (
    backward_weights,
    leave_one_out,
    log_quantile,
    rank_weights,
    winners,
)
from medistill_trl.methods.bond.anchor import ADAPTER, Anchor, AnchorFollows
from medistill_trl.methods.on_policy.trainer import OnPolicyTrainer
from medistill_trl.rewards import Rewards
from medistill_trl.rollouts import Sample, encode_sample, token_log_ratios
from medistill_trl.teacher import window_seed


@dataclass(frozen=True)
class FreshSample:
    """A sample of the student that a process draws under `jeffreys`.

    Args:
        prompt: Which of the window's.
        row: One of the process's rows that has this prompt.
        share: Its part in the prompt's weight: 1 / processes that have rows of the prompt.
    """

    prompt: int
    row: int
    share: float


def fresh_samples(process: int, num_rows: int, num_samples: int) -> list[FreshSample]:
    """One for each prompt that a process has rows of.

    A prompt's rows may be on several processes. Each then draws one: all have as much to do, and their shares make up
    for it.

    Args:
        num_rows: Rows of the window on each process.
        num_samples: Rows of each prompt, side by side over all processes.
    """
    start = process * num_rows
    found = []
    for prompt in range(start // num_samples, (start + num_rows - 1) // num_samples + 1):
        first = prompt * num_samples
        processes = (first + num_samples - 1) // num_rows - first // num_rows + 1
        found.append(FreshSample(prompt, max(0, first - start), 1 / processes))
    return found


class BondTrainer(OnPolicyTrainer):
    """`OnPolicyTrainer` whose samples are weighted by how they compare with the prompt's others.

    Every sample gets one weight w, the same for all its tokens, and the loss is −Σ w log π, which is
    cross-entropy where w is 1. A sample of weight 0 does not enter the training batch.
    """

    _name = "BOND"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.anchor = None
        if self.args.keeps_anchor:
            self.anchor = Anchor(self._student, self.args.anchor_ema)
            self.add_callback(AnchorFollows(self.anchor))

    def _roll_out(self, rows: list[dict]) -> list[dict[str, torch.Tensor]]:
        """Samples of all rows, scored and weighted; those that carry weight, in micro-batches."""
        weigh = self._from_anchor if self.args.objective == "jeffreys" else self._from_student
        samples, weights_B = weigh(rows)
        masked = self.args.mask_truncated_completions
        kept = [
            (sample, weight)
            for sample, weight in zip(samples, weights_B.cpu(), strict=True)
            if weight != 0 and not (masked and sample.truncated)
        ]
        return self._micro_batches(
            [encode_sample(self.form, sample) for sample, _ in kept],
            [weight.repeat(len(sample.token_ids)) for sample, weight in kept],
            [True] * len(kept),
        )

    # --- weights ---------------------------------------------------------------------------------

    def _from_student(self, rows: list[dict]) -> tuple[list[Sample], torch.Tensor]:
        """Samples of the student and their weights, (B,)."""
        args = self.args
        start = monotonic()
        samples = self._write(rows, window_seed(self))
        self._count_written(samples, monotonic() - start)
        _, rewards, log_ratios = self._score(samples, "train", args.num_samples)
        scores_GN = self._by_prompt(self._comparable(samples, rewards))
        self._note("best_reward_mean", scores_GN.amax(1))
        if args.objective == "best_of_n_sft":
            weights_GN = winners(scores_GN)
        else:
            weights_GN = rank_weights(scores_GN, args.rank_reward)
        if self.anchor is not None:
            ratios_GN = self._by_prompt(_sums(log_ratios["kl_to_anchor"]))
            charges = leave_one_out(ratios_GN.flatten(), args.num_samples).view_as(ratios_GN)
            weights_GN = weights_GN - args.anchor_kl_coef * charges
        return samples, self._of_this_process(weights_GN)

    def _from_anchor(self, rows: list[dict]) -> tuple[list[Sample], torch.Tensor]:
        """Samples of the anchor, N a prompt, then fresh ones of the student, with the weights of both, (B + F,)."""
        args, seed = self.args, window_seed(self)
        mine = fresh_samples(self.accelerator.process_index, len(rows), args.num_samples)
        start = monotonic()
        with self.anchor.in_place():
            drawn = self._write(rows, seed)
        fresh = self._write([rows[one.row] for one in mine], seed + len(rows))
        self._count_written(drawn + fresh, monotonic() - start)
        with self.accelerator.autocast():
            judged = self.reward(drawn)
        drawn_GN = self._by_prompt(self._comparable(drawn, judged))
        self._note("anchor_reward_mean", drawn_GN)
        self._note("best_reward_mean", drawn_GN.amax(1))
        _, rewards, log_ratios = self._score(fresh, "train")
        quantiles_F = log_quantile(
            self._comparable(fresh, rewards), drawn_GN[[one.prompt for one in mine]]
        )
        weights_F = self._backward(quantiles_F, _sums(log_ratios["kl_to_anchor"]))
        shares_F = torch.tensor([one.share for one in mine])
        weights_B = (1 - args.jeffreys_beta) * self._of_this_process(winners(drawn_GN))
        return drawn + fresh, torch.cat([weights_B.cpu(), weights_F * shares_F])

    def _backward(self, quantiles_F: torch.Tensor, ratios_F: torch.Tensor) -> torch.Tensor:
        """Weights of this process's fresh samples, (F,); those of all processes are their baseline."""
        args, process = self.args, self.accelerator.process_index
        everyone = gather_object([(quantiles_F.cpu(), ratios_F.cpu())])
        all_quantiles, all_ratios = (torch.cat(parts) for parts in zip(*everyone, strict=True))
        self._note("log_quantile_nats", all_quantiles)
        weights = backward_weights(
            all_quantiles, all_ratios, args.num_samples, args.jeffreys_beta, args.anchor_kl_coef
        )
        return weights.split([len(quantiles) for quantiles, _ in everyone])[process]

    def _comparable(self, samples: list[Sample], rewards: Rewards) -> torch.Tensor:
        """Rewards, (B,), with −inf where the teacher had nothing to read: such a score is 0, more than any
        log-probability, and would win."""
        read = torch.tensor([self._teacher_reads(sample) for sample in samples])
        return rewards.scores_B.masked_fill(~read.to(rewards.scores_B.device), -torch.inf)

    def _teacher_reads(self, sample: Sample) -> bool:
        completion = sample.completion
        if self.reward.shared is None:  # an end is read as the teacher's own end token
            return bool(completion.text) or completion.finished
        return bool(sample.token_ids)

    def _by_prompt(self, values_B: torch.Tensor) -> torch.Tensor:
        """(G, N) of all processes; a prompt's samples may be on several."""
        everywhere = self.accelerator.gather(values_B.to(self.accelerator.device))
        return everywhere.reshape(-1, self.args.num_samples)

    def _of_this_process(self, values_GN: torch.Tensor) -> torch.Tensor:
        return values_GN.flatten().chunk(self.accelerator.num_processes)[
            self.accelerator.process_index
        ]

    def _note(self, name: str, values: torch.Tensor) -> None:
        """Put a mean into the log, of what was read."""
        finite = values[values.isfinite()]
        if len(finite):
            self._metrics["train"][name].append(finite.mean().item())

    @property
    def _needs_own_log_probs(self) -> bool:
        return self.anchor is not None

    def _other_log_ratios(self, examples, own):
        if self.anchor is None:
            return {}
        with self.anchor.in_place():
            anchor = self._log_probs(examples)
        return {"kl_to_anchor": token_log_ratios(own, anchor)}

    # --- the final model -------------------------------------------------------------------------

    def checkpoint_files(self, step: int) -> set[str]:
        """See `Method`."""
        anchor = adapter_files(ADAPTER) if self.anchor is not None else set()
        return super().checkpoint_files(step) | anchor

    def save_model(self, output_dir=None, _internal_call=False):
        """A checkpoint holds the anchor, the final model does not."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir) / ADAPTER
            shutil.rmtree(folder, ignore_errors=True)


def _sums(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([value.sum() for value in values])
