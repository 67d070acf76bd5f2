"""The trainer of PPO.

Shapes: B samples of a process, T tokens of the longest, C tokens of one, N completion tokens of a micro-batch, H hidden
size.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer
from trl.experimental.ppo import PPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from medistill_trl.checkpoints import Totals
from medistill_trl.coverage import Coverage
from medistill_trl.losses.advantages import Moments, explained_variance, gae, value_loss, whiten
from medistill_trl.losses.heads import OutputHead, states_before_head
from medistill_trl.losses.policy import discounted_returns, policy_loss
from medistill_trl.losses.token_kl import completion_states
from medistill_trl.losses.token_means import TokenMeans
from medistill_trl.methods.ppo import value_head
from medistill_trl.methods.ppo.rollout import Sampled, Scored, micro_batch, order, sampled
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.rewards import TeacherReward
from medistill_trl.rollouts import (
    PromptSampler,
    Sample,
    encode_sample,
    summary,
    token_log_ratios,
    write_samples,
)
from medistill_trl.teacher import Sampling, window_seed


class PPODistillTrainer(PPOTrainer):
    """`PPOTrainer` with Transformers' own training loop, and a value head instead of a second model.

    An optimizer step is one minibatch of one of PPO's epochs over a rollout; a rollout is drawn before the first of
    them. Checkpoints, gradient clipping, mixed precision, evaluation and callbacks are those of `Trainer`.

    Args:
        reward: The teacher.
        form: The student's prompt format.
        totals: Where tokens are counted.
        write_batch_size: Prompts per generation; None for a whole rollout at once.
    """

    _name = "PPO distillation"
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the minibatch's tokens

    # What the parent replaces, put back. Its constructor makes optimizer and process group of its own and its loop
    # uses nothing of Trainer's, so neither checkpoints nor max_steps nor clipping would work.
    train = Trainer.train
    save_model = Trainer.save_model
    get_eval_dataloader = Trainer.get_eval_dataloader

    def __init__(
        self,
        model,
        args,
        train_dataset,
        eval_dataset,
        reward: TeacherReward,
        form: PromptFormat,
        totals: Totals,
        write_batch_size: int | None = None,
    ):
        disable_dropout_in_model(model)  # what is trained is what was sampled
        if isinstance(model, PeftModel) and args.gradient_checkpointing:
            model.enable_input_require_grads()  # else nothing in a checkpointed layer needs a gradient
        self.value_head = value_head.attach(model)
        super(PPOTrainer, self).__init__(
            model=model,
            args=args,
            data_collator=list,  # rows as they are
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=form.tokenizer,
        )
        self.reward = reward
        self.form = form
        self.totals = totals
        self.write_batch_size = write_batch_size
        self._rollout: list[Sampled] = []
        self._means = TokenMeans()
        self._coverage = Coverage(self.args.min_coverage, self.is_world_process_zero())
        self._logged = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._evaluated = 0
        OutputHead.of(self._student).check(self._student)
        reward.teacher.check_log_probs()

    @property
    def _student(self):
        return self.accelerator.unwrap_model(self.model)

    def create_optimizer(self, model=None):
        """The value head is in a group of its own where it has its own learning rate."""
        rate = self.args.value_learning_rate
        if self.optimizer is not None or rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        critic = list(self.value_head.parameters())
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if all(p is not own for own in critic)]
        optimizer.add_param_group({"params": critic, "lr": rate, "weight_decay": 0.0})
        return optimizer

    # --- prompts and minibatches -----------------------------------------------------------------

    def get_train_dataloader(self):
        """Gives the prompts of a rollout whole, and again for each micro-batch that is trained on."""
        return self._get_dataloader(
            self.train_dataset,
            "Training",
            self.args.rollout_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset=None) -> PromptSampler:
        args = self.args
        prompts = args.rollout_size * self.accelerator.num_processes
        steps = len(self.train_dataset) // prompts * args.steps_per_rollout
        return PromptSampler(
            self.train_dataset,
            mini_repeat_count=1,
            batch_size=prompts,
            repeat_count=args.steps_per_rollout * args.gradient_accumulation_steps,
            seed=args.seed,
            epoch=lambda: self.state.global_step // steps,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """A minibatch as micro-batches, and its completion tokens over all processes."""
        rows = super().get_batch_samples(epoch_iterator, num_batches, device)[0][0]
        step, args = self.state.global_step, self.args
        use = step % args.steps_per_rollout
        if use == 0:
            self._rollout = self._roll_out(rows)
        epoch, number = divmod(use, args.num_mini_batches)
        places = order(len(self._rollout), epoch, window_seed(self, step - use))
        size = args.per_device_train_batch_size
        starts = range(number * num_batches * size, (number + 1) * num_batches * size, size)
        batches = [
            self._micro_batch([self._rollout[n] for n in places[s : s + size]]) for s in starts
        ]
        tokens = torch.tensor(sum(len(batch["advantages"]) for batch in batches), device=device)
        num_items = self.accelerator.gather(tokens).sum()
        self.totals.trained += int(num_items)
        return batches, num_items

    def _micro_batch(self, samples: list[Sampled]) -> dict[str, torch.Tensor]:
        return micro_batch(samples, self.form.tokenizer.pad_token_id, self.args.device)

    def _prepare_inputs(self, inputs):
        """As they are: on the device already."""
        return inputs

    # --- rollouts --------------------------------------------------------------------------------

    def _roll_out(self, rows: list[dict]) -> list[Sampled]:
        """One completion of each row, with all that training will ask of it."""
        start = monotonic()
        samples = self._write(rows, window_seed(self))
        seconds = monotonic() - start
        written = sum(len(sample.token_ids) for sample in samples)
        self.totals.generated_student += written
        speed = self._total(torch.tensor([written / seconds]))
        self._logged["train"]["generated_tokens_per_second"].append(speed.item())
        scored = self._score(samples, "train")
        advantages, returns = self._credit(scored)
        columns = zip(
            scored.examples, scored.log_probs, scored.values, advantages, returns, strict=True
        )
        return [
            sampled(example, log_probs=p, values=v, advantages=a, returns=r)
            for example, p, v, a, r in columns
        ]

    def _write(self, rows: list[dict], seed: int) -> list[Sample]:
        sampling = Sampling(self.args.max_completion_length, temperature=1.0)
        with self.accelerator.autocast():
            samples = write_samples(
                self._student, self.form, rows, sampling, seed, self.write_batch_size
            )
        return [sample.readable(self.reward.shared) for sample in samples]

    def _score(self, samples: list[Sample], mode: str) -> Scored:
        """What student and teacher make of samples; the log gets a summary."""
        examples = [encode_sample(self.form, sample) for sample in samples]
        own, values = self._read(examples)
        with self.accelerator.autocast():
            rewards = self.reward(samples, own)
        others = {} if rewards.teacher_log_probs is None else {"teacher": rewards.teacher_log_probs}
        if isinstance(self._student, PeftModel):
            with self._student.disable_adapter():
                others["start"] = self._read(examples)[0]
        log_ratios = {
            f"kl_to_{name}": token_log_ratios(own, log_probs) for name, log_probs in others.items()
        }
        logged = summary(
            samples, rewards.scores_B, rewards.parts, log_ratios, rewards.tokens_in_spans
        )
        self._coverage.check(logged)
        for name, value in logged.items():
            self._logged[mode][name].append(value)
        return Scored(examples, own, values, rewards, log_ratios)

    @torch.no_grad()
    def _read(self, examples: list) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """log π and V (in its units) of every completion token, (C,) each: by the loss's forward and arithmetic."""
        student, size = self._student, self.args.per_device_train_batch_size
        was_training = student.training
        student.eval()
        log_probs, values = [], []
        for first in range(0, len(examples), size):
            part = [sampled(example) for example in examples[first : first + size]]
            with self.accelerator.autocast():
                states_NH, tokens_N = self._states(student, self._micro_batch(part))
            _, terms = self._policy_loss(states_NH, tokens_N, torch.zeros(len(tokens_N)))
            lengths = [int((sample["labels"] != IGNORED).sum()) for sample in part]
            log_probs += terms["log_prob"].split(lengths)
            values += self.value_head(states_NH).split(lengths)
        student.train(was_training)
        return log_probs, values

    def _credit(self, scored: Scored) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Advantages, whitened over all processes, and the critic's targets in its units, (C,) each."""
        args, critic = self.args, self.value_head
        units_BT = pad_sequence(scored.values, batch_first=True)
        rewards_BT = scored.rewards.rewards_BT.to(units_BT.device)
        mask_BT = scored.rewards.mask_BT.to(units_BT.device)
        if args.kl_coef:
            kl_BT = pad_sequence(scored.log_ratios["kl_to_start"], batch_first=True)
            rewards_BT = rewards_BT - args.kl_coef * kl_BT
        earned_BT = discounted_returns(rewards_BT, mask_BT, args.gamma)
        earned = Moments.of(earned_BT[mask_BT], self._total)
        critic.set_units(earned)
        values_BT = critic.in_nats(units_BT)
        # Judged by what was earned in truth: its targets are partly its own words.
        errors = Moments.of((earned_BT - values_BT)[mask_BT], self._total)
        self._logged["train"]["explained_variance"].append(explained_variance(earned, errors))
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, args.gamma, args.lam)
        advantages_N = advantages_BT[mask_BT]
        if args.whiten_advantages:
            advantages_N = whiten(advantages_N, Moments.of(advantages_N, self._total))
        lengths = [len(values) for values in scored.values]
        return advantages_N.split(lengths), critic.in_units(returns_BT[mask_BT]).split(lengths)

    def _total(self, sums: torch.Tensor) -> torch.Tensor:
        """A vector added up over processes, to the same bits on each."""
        return self.accelerator.gather(sums.to(self.args.device)[None]).sum(0)

    # --- the loss --------------------------------------------------------------------------------

    def _states(self, model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The states that predict completion tokens, (N, H), and those tokens (N,)."""
        hidden_BTH, _ = states_before_head(model, self._student, inputs)
        return completion_states(hidden_BTH, inputs["labels"])

    def _policy_loss(self, states_NH, tokens_N, advantages_N, old_log_probs_N=None) -> tuple:
        args = self.args
        with self.accelerator.autocast():
            return policy_loss(
                states_NH,
                tokens_N,
                OutputHead.of(self._student),
                advantages_N.to(states_NH.device),
                old_log_probs_N=old_log_probs_N,
                clip=(args.epsilon, args.epsilon),
                entropy_coef=args.entropy_coef,
                chunk_size=args.loss_chunk_size,
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args = self.args
        states_NH, tokens_N = self._states(model, inputs)
        old_N = inputs["log_probs"]
        policy, terms = self._policy_loss(states_NH, tokens_N, inputs["advantages"], old_N)
        judged_NH = states_NH if args.value_gradient_to_trunk else states_NH.detach()
        value, bounded_N = value_loss(
            self.value_head(judged_NH), inputs["values"], inputs["returns"], args.value_clip
        )
        log_ratio_N = terms["log_prob"] - old_N
        self._means.add(
            {
                "tokens": tokens_N.new_tensor(len(tokens_N)).float(),
                "entropy": terms["entropy"].sum().float(),
                "clipped": terms["clipped"].sum().float(),
                "approx_kl": (terms["ratio"] - 1 - log_ratio_N).sum().float(),
                "value_error": value.detach(),
                "value_clipped": bounded_N.sum().float(),
            }
        )
        loss = policy + args.value_coef * value
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
        """Adds what was collected since the last log: means over rollouts, and per completion token over all
        processes."""
        training = self.model.training
        collected = self._logged["train" if training else "eval"]
        prefix = "" if training else "eval_"
        means = {f"{prefix}{name}": sum(found) / len(found) for name, found in collected.items()}
        collected.clear()
        if training:
            means |= self._means.take(self.accelerator)
        logs |= means  # in place: an evaluation returns them
        super().log(logs, start_time)

    # --- checkpoints -----------------------------------------------------------------------------

    def _save(self, output_dir=None, state_dict=None):
        """Without the value head: what is saved loads as any model or adapter does."""
        if state_dict is not None:  # DeepSpeed's, taken of all it trains
            state_dict = value_head.without(state_dict)
        with value_head.detached(self._student):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            value_head.save(self.value_head, folder)
        if self._amid_rollout(self.state.global_step):
            torch.save(self._rollout, folder / _rollout_file(self.accelerator.process_index))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with value_head.detached(self._student):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        value_head.load(self.value_head, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._amid_rollout(self.state.global_step):
            path = Path(checkpoint) / _rollout_file(self.accelerator.process_index)
            self._rollout = torch.load(path, weights_only=True)

    def checkpoint_files(self, step: int) -> set[str]:
        """See `Method`."""
        processes = range(self.args.world_size if self._amid_rollout(step) else 0)
        return {value_head.FILE, *map(_rollout_file, processes)}

    def _amid_rollout(self, step: int) -> bool:
        return step % self.args.steps_per_rollout != 0


def _rollout_file(process: int) -> str:
    return f"rollout_{process}.pt"
