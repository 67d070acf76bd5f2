"""`DPOTrainer` whose rejected answers are the student's own, written anew at the start of each iteration."""

import json
import logging
import random
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, get_scheduler
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from medistill_trl.checkpoints import Totals, kept_dtypes
from medistill_trl.data import Prompt
from medistill_trl.errors import RunFailed
from medistill_trl.files import write_text
from medistill_trl.losses.heads import OutputHead, states_before_head
from medistill_trl.losses.preference import PairValues, sequence_log_probs, spin_loss
from medistill_trl.methods.spin import progress, reference, rounds
from medistill_trl.methods.spin.rounds import Pair, RoundFile
from medistill_trl.methods.spin.schedule import Schedule
from medistill_trl.prompts import PromptFormat
from medistill_trl.run_directory import RunDirectory
from medistill_trl.teacher import Completion, Sampling, complete

logger = logging.getLogger(__name__)

DIGESTS = "rounds.json"  # beside a checkpoint
MEASURED_PAIRS = 128  # of a round, at the end of its iteration


class SpinTrainer(DPOTrainer):
    """One `Trainer` loop over all iterations.

    Args:
        model: The student.
        schedule: Which pairs are trained on at which step.
        prompts: The training prompts.
        chosen: The teacher's completion of each, y⁺.
        form: The student's prompt format.
        sampling: How the student writes y⁻.
        totals: Where tokens are counted.
        directory: Where rounds and records are kept.
        write_batch_size: Prompts per generation at most, whatever `generation_batch_size` says; None for no limit.
    """

    _name = "SPIN"

    def __init__(
        self,
        *args,
        model: PreTrainedModel,
        schedule: Schedule,
        prompts: list[Prompt],
        chosen: list[Completion],
        form: PromptFormat,
        sampling: Sampling,
        totals: Totals,
        directory: RunDirectory,
        write_batch_size: int | None = None,
        **kwargs,
    ):
        wanted = kwargs["args"].reference == "previous"
        super().__init__(
            *args,
            model=model,
            ref_model=reference.for_constructor(model, wanted),
            train_dataset=Dataset.from_dict(schedule.rows()),
            eval_dataset=Dataset.from_dict({"round": [0], "prompt": [0]}),  # see `evaluate`
            data_collator=list,  # rows become pairs when they are used: some are not written yet
            processing_class=form.tokenizer,
            **kwargs,
        )
        student = self.accelerator.unwrap_model(self.model)
        OutputHead.of(student).check(student)
        self.previous = reference.PreviousIterate(student, self.ref_model) if wanted else None
        self.schedule = schedule
        self.prompts = prompts
        self.chosen = chosen
        self.form = form
        self.sampling = sampling
        self.totals = totals
        self.directory = directory
        self.write_batch_size = write_batch_size
        # compute_loss divides by the window's pairs itself: Trainer must not divide by its steps.
        self.model_accepts_loss_kwargs = True
        self._collate = DataCollatorForPreference(form.tokenizer.pad_token_id)
        self._pairs: dict[int, list[Pair]] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._digests: dict[str, str] = {}  # of the rounds' files when the checkpoint was saved
        self.add_callback(IterationEnd(self))

    def _prepare_dataset(self, dataset, *args):
        """Rows name pairs; there is no text in them to tokenize."""
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        """The schedule is the order."""
        return SequentialSampler(self.train_dataset)

    # --- iterations ------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The window's micro-batches, and its pairs over all processes: dividing by them makes 1×8 and
        8×1 the same step."""
        iteration = self.schedule.iteration_at(self.state.global_step)
        if self.state.global_step == self.schedule.spans[iteration].start:
            self._begin(iteration)
        self._pairs = {
            number: self._pairs.get(number) or self._read_round(number, iteration)
            for number in self.schedule.rounds(iteration)
        }
        batches = [
            [self._pairs[row["round"]][row["prompt"]] for row in rows]
            for rows in islice(epoch_iterator, num_batches)
        ]
        counted = [pair for batch in batches for pair in batch if pair.counts]
        counts = torch.tensor([[len(counted), sum(pair.num_tokens for pair in counted)]])
        counts = self.accelerator.gather(counts.to(device)).sum(0)
        self.totals.trained += counts[1].item()
        return [self._collated(batch) for batch in batches], counts[0]

    def _collated(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        batch = self._collate([vars(pair) for pair in pairs])
        batch["weights"] = torch.tensor([float(pair.counts) for pair in pairs])
        return batch

    def _begin(self, iteration: int) -> None:
        """The policy becomes the reference and writes its answers; the optimizer starts afresh."""
        if self.previous is not None:
            self.previous.follow()
        self._write_round(iteration)
        self.optimizer.optimizer.state.clear()

    def finish(self, iteration: int) -> dict:
        """Measure an iteration that has ended, and record it."""
        pairs = self._pairs[iteration]
        student = self.accelerator.unwrap_model(self.model)
        measured = [pair for pair in pairs if pair.counts][:MEASURED_PAIRS]
        record = {
            "iteration": iteration,
            "first_step": self.schedule.spans[iteration].start,
            "steps": len(self.schedule.spans[iteration]),
            "repeated_pairs": self.schedule.repeated(iteration),
            **rounds.describe(pairs),
            **progress.measure(student, measured, self.previous, self.beta),
        }
        if self.accelerator.is_main_process:
            progress.write_record(self.directory, record)
        shown = {f"spin_{name}": value for name, value in record.items() if value is not None}
        self.state.log_history.append(
            {**shown, "epoch": self.state.epoch, "step": self.state.global_step}
        )
        logger.info("iteration %d: %s", iteration, record)
        return record

    # --- rounds ----------------------------------------------------------------------------------

    def _round_file(self, number: int, weights: list[torch.Tensor] | None) -> RoundFile:
        """Where a round is kept.

        Args:
            weights: That wrote it; None if they are not known any more.
        """
        header = {
            "round": number,
            "step": self.schedule.spans[number].start,
            "seed": self.args.seed,
            "prompts": len(self.prompts),
            "sampling": self.sampling.to_dict(),
        }
        if weights is not None:
            header["weights"] = rounds.fingerprint(weights)
        return RoundFile(self.directory.path / f"rounds/round-{number}.jsonl", header)

    def _read_round(self, number: int, iteration: int) -> list[Pair]:
        """A round that was written in an earlier launch, or an earlier iteration."""
        known = number == iteration and self.previous is not None
        file = self._round_file(number, self.previous.weights() if known else None)
        answers = file.read()
        if len(answers) < len(self.prompts):
            raise RunFailed(
                f"{file.path}: iteration {iteration} trains on {len(self.prompts)} pairs of this round, and "
                f"{len(answers)} are there that fit this run; restore the file, or start a new run"
            )
        if file.digest() != self._digests.get(str(number), file.digest()):
            raise RunFailed(
                f"{file.path}: has changed since the checkpoint was saved, and the run would be another one; restore "
                "the file, or start a new run"
            )
        return self._make_pairs(answers)

    def _make_pairs(self, answers: list[dict]) -> list[Pair]:
        pairs: dict[int, Pair] = {}
        for answer in answers:
            index = answer["prompt"]
            pairs[index] = rounds.make_pair(
                self.form,
                self.form.render(self.prompts[index].question),
                self.chosen[index],
                rounds.from_record(answer),
                self.args.max_length,
            )
        return [pairs[index] for index in range(len(self.prompts))]

    def _write_round(self, number: int) -> None:
        """Let the student answer every prompt, going on from what an earlier launch has written."""
        student = self.accelerator.unwrap_model(self.model)
        file = self._round_file(number, [p for p in student.parameters() if p.requires_grad])
        size = min(self.args.generation_batch_size, self.write_batch_size or sys.maxsize)
        # Longest prompt first: like lengths waste little padding, and memory runs out early if at all.
        order = sorted(range(len(self.prompts)), key=lambda n: -len(self.prompts[n].question))
        batches = [order[start : start + size] for start in range(0, len(order), size)]

        def answer(index: int) -> list[dict]:
            # Mixed into 32 bits: torch seeds its CPU generator with no more.
            seed = random.Random(f"{self.args.seed} {number} {index}").getrandbits(32)
            return self._answer(student, batches[index], seed)

        answers = rounds.complete_round(file, [len(batch) for batch in batches], answer)
        if self.accelerator.is_main_process:
            self.totals.generated_student += sum(
                len(a["token_ids"]) + (a["end_id"] is not None) for a in answers
            )
        self._pairs[number] = self._make_pairs(answers)

    def _answer(self, student: PreTrainedModel, batch: list[int], seed: int) -> list[dict]:
        prompts = [self.form.render(self.prompts[index].question) for index in batch]
        with self.accelerator.autocast():
            completions = complete(student, self.form, prompts, self.sampling, seed)
        return [
            rounds.to_record(index, self.prompts[index].id, self.chosen[index], completion)
            for index, completion in zip(batch, completions, strict=True)
        ]

    # --- the loss --------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        before = None
        if self.previous is not None:
            with torch.no_grad(), self.previous.in_place() as frozen:
                before = self._log_probs(frozen, frozen, inputs)
        policy = self._log_probs(model, self.accelerator.unwrap_model(model), inputs)
        losses_B, rewards = spin_loss(policy, before, self.beta)
        weights_B = inputs["weights"]
        self._add(policy, rewards, weights_B)
        # DDP averages gradients over processes, and the window's pairs are of all of them.
        scale = self.accelerator.num_processes / num_items_in_batch.clamp_min(1)
        return (losses_B * weights_B).sum() * scale

    def _log_probs(
        self, model: nn.Module, unwrapped: PreTrainedModel, inputs: dict[str, torch.Tensor]
    ) -> PairValues:
        """Of both completions of each pair.

        Args:
            model: As it runs, perhaps wrapped by DDP.
            unwrapped: The same.
        """
        hidden_RTH, _ = states_before_head(model, unwrapped, inputs)
        with self.accelerator.autocast():
            log_probs_R = sequence_log_probs(
                hidden_RTH,
                inputs["input_ids"],
                inputs["completion_mask"],
                OutputHead.of(unwrapped),
                self.args.loss_chunk_size,
            )
        return PairValues(*log_probs_R.chunk(2))  # the first half of the rows is y⁺

    # --- schedule of the learning rate -----------------------------------------------------------

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The recipe's schedule over each iteration by itself: every one is a training run."""
        if self.lr_scheduler is None:
            factors = [self._factor(len(span)) for span in self.schedule.spans]

            def factor(step: int) -> float:
                iteration = self.schedule.iteration_at(step)
                return factors[iteration](step - self.schedule.spans[iteration].start)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _factor(self, num_steps: int):
        """step of an iteration → share of the learning rate."""
        stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=self.args.learning_rate)
        scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            stand_in,
            num_warmup_steps=self.args.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        return scheduler.lr_lambdas[0]

    # --- evaluation and the log ------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Calls the callbacks, the held-out check among them. There is no loss to evaluate: its pairs and
        its reference change from iteration to iteration."""
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {}

    def _add(self, policy: PairValues, rewards: PairValues, weights_B: torch.Tensor) -> None:
        """Sums over the pairs that carry loss, under the names DPOTrainer logs."""
        margins_B = rewards.chosen - rewards.rejected
        columns = {
            "rewards/chosen": rewards.chosen,
            "rewards/rejected": rewards.rejected,
            "rewards/margins": margins_B,
            "rewards/accuracies": (margins_B > 0).float(),
            "logps/chosen": policy.chosen.detach(),
            "logps/rejected": policy.rejected.detach(),
            "pairs": torch.ones_like(weights_B),
        }
        for name, values_B in columns.items():
            self._sums[name] = self._sums.get(name, 0) + (values_B * weights_B).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means per pair since the last log, over all processes."""
        sums = {n: self.accelerator.gather(v.reshape(1)).sum() for n, v in self._sums.items()}
        self._sums = {}
        if sums:
            pairs = sums.pop("pairs").clamp_min(1)
            logs = {**logs, **{name: (value / pairs).item() for name, value in sums.items()}}
        super().log(logs, start_time)

    # --- checkpoints -----------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            digests = {number: self._round_file(number, None).digest() for number in self._pairs}
            write_text(folder / DIGESTS, json.dumps(digests))
            if self.previous is not None:
                self.previous.save(folder)

    def checkpoint_files(self, step: int) -> set[str]:
        """See `Method`."""
        return {DIGESTS} | (self.previous.files() if self.previous is not None else set())

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Loads the reference too, which an adapter is in the dtype of the one in training."""
        with kept_dtypes(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._digests = json.loads((Path(resume_from_checkpoint) / DIGESTS).read_text())
        if self.previous is not None:
            self.previous.load(Path(resume_from_checkpoint))

    def save_model(self, output_dir=None, _internal_call=False):
        """A checkpoint holds the reference, the final model does not."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir) / reference.ADAPTER
            shutil.rmtree(folder, ignore_errors=True)


class IterationEnd(TrainerCallback):
    """Closes an iteration after its last step, before anything is saved: an epoch of the recipe's
    strategies is an iteration here."""

    def __init__(self, trainer: SpinTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        schedule = self.trainer.schedule
        iteration = schedule.iteration_at(state.global_step - 1)
        if state.global_step != schedule.spans[iteration].stop:
            return control
        record = self.trainer.finish(iteration)
        if state.global_step == schedule.num_steps:
            return control
        if args.stop_margin is not None and (record["margin"] or 0.0) < args.stop_margin:
            logger.info(
                "stopped after iteration %d: margin %s below stop_margin %s",
                iteration, record["margin"], args.stop_margin,
            )  # fmt: skip
            # The run is complete: it was to end here. Then what ends any run.
            state.max_steps = state.global_step
            return DefaultFlowCallback().on_step_end(args, state, control)
        control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
        control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH
        control.should_save |= args.save_strategy == SaveStrategy.EPOCH
        return control
