"""The trainer of on-policy distillation.

Shapes: B completions of a process, T tokens of the longest, N completion tokens of a micro-batch, H hidden
size.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic

import torch
from peft import PeftModel
from trl import GRPOTrainer

from medistill_trl.checkpoints import Totals
from medistill_trl.coverage import Coverage
from medistill_trl.losses.heads import OutputHead, states_before_head
from medistill_trl.losses.policy import policy_loss, sequence_advantages, token_advantages
from medistill_trl.losses.token_kl import completion_states
from medistill_trl.losses.token_means import TokenMeans
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.rewards import Rewards, TeacherReward
from medistill_trl.rollouts import (
    PromptSampler,
    Sample,
    encode_sample,
    split_batch,
    summary,
    token_log_ratios,
    training_batch,
    write_samples,
)
from medistill_trl.teacher import Sampling, completion_log_probs, window_seed


class OnPolicyTrainer(GRPOTrainer):
    """`GRPOTrainer` with rewards per token, and a loss without whole logits.

    Args:
        reward: The teacher.
        form: The student's prompt format.
        totals: Where tokens are counted.
        write_batch_size: Prompts per generation; None for a whole window at once.
    """

    _name = "On-policy distillation"

    def __init__(
        self,
        *args,
        reward: TeacherReward,
        form: PromptFormat,
        totals: Totals,
        write_batch_size: int | None = None,
        **kwargs,
    ):
        # The parent insists on a reward function; a window is scored in `_roll_out`.
        super().__init__(*args, reward_funcs=[reward], processing_class=form.tokenizer, **kwargs)
        self.reward = reward
        self.form = form
        self.totals = totals
        self.write_batch_size = write_batch_size
        self._window: list[dict[str, torch.Tensor]] = []
        self._means = TokenMeans()
        self._coverage = Coverage(self.args.min_coverage, self.is_world_process_zero())
        self._evaluated = 0
        OutputHead.of(self._student).check(self._student)
        reward.teacher.check_log_probs()

    @property
    def _student(self):
        return self.accelerator.unwrap_model(self.model)

    # --- samples ---------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None) -> PromptSampler:
        prompts = self.args.generation_batch_size // self.args.num_generations
        steps = len(self.train_dataset) // prompts * self.args.num_iterations
        return PromptSampler(
            self.train_dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=prompts,
            repeat_count=self.args.num_iterations * self.args.steps_per_generation,
            shuffle=self.args.shuffle_dataset,
            seed=self.args.seed,
            epoch=lambda: self.state.global_step // steps,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The window's micro-batches, and its completion tokens over all processes: dividing by them
        makes 1×8 and 8×1 the same step."""
        # The data loader gives all prompts of the window again for each micro-batch of it.
        prompts = super().get_batch_samples(epoch_iterator, num_batches, device)[0]
        if self.state.global_step % self.args.num_iterations == 0:
            self._window = self._roll_out(prompts[0])
        tokens = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in self._window)
        num_items = self.accelerator.gather(tokens.to(device)).sum()
        self.totals.trained += int(num_items)
        return self._window, num_items

    def _prepare_inputs(self, inputs):
        """As they are: the window is on the device, and the parent would generate here."""
        return inputs

    def _roll_out(self, rows: list[dict]) -> list[dict[str, torch.Tensor]]:
        """Completions of all rows, scored and credited, in micro-batches."""
        start = monotonic()
        samples = self._write(rows, window_seed(self))
        self._count_written(samples, monotonic() - start)
        examples, rewards, _ = self._score(samples, "train", self.args.num_generations)
        credits_BT = self._advantages(rewards)
        masked = self.args.mask_truncated_completions
        learnt = [not (masked and sample.truncated) for sample in samples]
        return self._micro_batches(examples, credits_BT, learnt)

    def _micro_batches(
        self, examples: list, values: Sequence[torch.Tensor], learnt: list[bool]
    ) -> list[dict[str, torch.Tensor]]:
        """As many as the window has, see `training_batch`; blank ones where there is nothing left, since every
        process takes the same number of them."""
        steps, pad_token_id = (
            self.args.gradient_accumulation_steps,
            self.form.tokenizer.pad_token_id,
        )
        size = max(self.args.per_device_train_batch_size, math.ceil(len(examples) / steps))
        window = []
        for first in range(0, size * steps, size):
            part = slice(first, first + size)
            batch = training_batch(
                examples[part] or [{"input_ids": [pad_token_id], "labels": [IGNORED]}],
                values[part] if examples[part] else [torch.zeros(0)],
                learnt[part] or [False],
                pad_token_id,
            )
            window.append({name: tensor.to(self.args.device) for name, tensor in batch.items()})
        return window

    def _count_written(self, samples: list[Sample], seconds: float) -> None:
        written = sum(len(sample.token_ids) for sample in samples)
        self.totals.generated_student += written
        speed = self.accelerator.gather(torch.tensor(written / seconds, device=self.args.device))
        self._metrics["train"]["generated_tokens_per_second"].append(speed.sum().item())

    def _write(self, rows: list[dict], seed: int) -> list[Sample]:
        sampling = Sampling(self.args.max_completion_length, temperature=1.0)
        with self.accelerator.autocast():
            samples = write_samples(
                self._student, self.form, rows, sampling, seed, self.write_batch_size
            )
        return [sample.readable(self.reward.shared) for sample in samples]

    def _score(
        self, samples: list[Sample], mode: str, side_by_side: int = 1
    ) -> tuple[list, Rewards, dict[str, list[torch.Tensor]]]:
        """Tokens, rewards and log-ratios to other models by their names; puts what they are into the log.

        Args:
            side_by_side: Samples of a prompt, one beside the other. Where the log alone asks for a forward, it is of
                the first of them: its mean estimates the same.
        """
        examples = [encode_sample(self.form, sample) for sample in samples]
        logged = slice(None, None, side_by_side)
        read = slice(None) if self._needs_own_log_probs else logged
        own = self._log_probs(examples[read])
        with self.accelerator.autocast():
            rewards = self.reward(samples, own)
        log_ratios = {}
        if rewards.teacher_log_probs is not None:
            log_ratios["kl_to_teacher"] = token_log_ratios(own, rewards.teacher_log_probs[read])
        if isinstance(self._student, PeftModel):
            with self._student.disable_adapter():
                start = self._log_probs(examples[logged])
            of_logged = own if read == logged else own[logged]
            log_ratios["kl_to_start"] = token_log_ratios(of_logged, start)
        log_ratios |= self._other_log_ratios(examples, own)
        means = summary(
            samples, rewards.scores_B, rewards.parts, log_ratios, rewards.tokens_in_spans
        )
        self._coverage.check(means)
        for name, value in means.items():
            self._metrics[mode][name].append(value)
        return examples, rewards, log_ratios

    @property
    def _needs_own_log_probs(self) -> bool:
        """Does what is learnt depend on the student's log-probabilities of all samples?"""
        return self.args.reward == "token_kl"

    def _other_log_ratios(
        self, examples: list, own: list[torch.Tensor]
    ) -> dict[str, list[torch.Tensor]]:
        """To models of a subclass, by name; it sees to it that `own` is of all examples."""
        return {}

    def _log_probs(self, examples: list) -> list[torch.Tensor]:
        with self.accelerator.autocast():
            return completion_log_probs(
                self._student,
                examples,
                batch_size=self.args.per_device_train_batch_size,
                chunk_size=self.args.loss_chunk_size,
            )

    def _advantages(self, rewards: Rewards) -> torch.Tensor:
        """(B, T) of this process; a prompt's samples may be on several."""
        accelerator, args = self.accelerator, self.args
        here = slice(
            accelerator.process_index * len(rewards.scores_B),
            (accelerator.process_index + 1) * len(rewards.scores_B),
        )

        def everywhere(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(accelerator.device)
            return accelerator.gather(accelerator.pad_across_processes(tensor, dim=1))

        mask_BT = everywhere(rewards.mask_BT.long())
        credit = args.gamma, args.num_generations, args.baseline
        if rewards.per_token:
            return token_advantages(everywhere(rewards.rewards_BT), mask_BT, *credit)[here]
        return sequence_advantages(everywhere(rewards.scores_B), mask_BT, *credit)[here]

    # --- the loss --------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden_BTH, _ = states_before_head(model, self._student, inputs)
        states_NH, tokens_N = completion_states(hidden_BTH, inputs["labels"])
        args, reused = self.args, "old_log_probs_N" in inputs
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        with self.accelerator.autocast():
            loss, terms = policy_loss(
                states_NH,
                tokens_N,
                OutputHead.of(self._student),
                inputs["values"][:, 1:][inputs["labels"][:, 1:] != IGNORED],
                old_log_probs_N=inputs.get("old_log_probs_N"),
                clip=(args.epsilon, high),
                entropy_coef=args.entropy_coef,
                chunk_size=args.loss_chunk_size,
            )
        if args.num_iterations > 1 and not reused:  # kept in the window for the next time
            inputs["old_log_probs_N"] = terms["log_prob"]
        sums = {"tokens": tokens_N.new_tensor(len(tokens_N)).float()}
        sums["entropy"] = terms["entropy"].sum().float()
        if args.num_iterations > 1:
            sums["clipped"] = terms["clipped"].sum().float()
        self._means.add(sums)
        # DDP averages gradients over processes.
        return loss / num_items_in_batch.clamp_min(1) * self.accelerator.num_processes

    # --- evaluation and log ----------------------------------------------------------------------

    def evaluate(self, *args, **kwargs):
        """The rewards of samples of held-out prompts, drawn alike at every evaluation."""
        self._evaluated = 0
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """No loss: that of a policy gradient says nothing."""
        seed = window_seed(self, self.state.max_steps + 1 + self._evaluated)  # none of training
        self._evaluated += 1
        self._score(self._write(inputs, seed), "eval")
        return None, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means per completion token since the last log, over all processes."""
        means = self._means.take(self.accelerator) if self.model.training else {}
        super().log({**logs, **means}, start_time)

    # --- checkpoints amid a window that is used several times ------------------------------------

    def checkpoint_files(self, step: int) -> set[str]:
        """See `Method`."""
        amid = step % self.args.num_iterations != 0
        return {_window_file(n) for n in range(self.args.world_size)} if amid else set()

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.state.global_step % self.args.num_iterations:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            torch.save(self._window, folder / _window_file(self.accelerator.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.state.global_step % self.args.num_iterations:
            path = Path(checkpoint) / _window_file(self.accelerator.process_index)
            # Several CPU processes have devices such as cpu:0, which torch.load does not know.
            kept = torch.load(path, map_location="cpu", weights_only=True)
            device = self.args.device
            # Smaller micro-batches since then, see `out_of_memory`.
            parts = self.args.gradient_accumulation_steps // len(kept)
            self._window = [
                {name: t.to(device) for name, t in part.items()}
                for batch in kept
                for part in split_batch(batch, parts)
            ]


def _window_file(process: int) -> str:
    return f"window_{process}.pt"
