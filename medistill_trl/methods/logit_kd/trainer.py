"""The trainer of Logit-KD, which AdaKD's builds on, with the teacher at hand."""

import random
from collections.abc import Iterator
from itertools import islice

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.experimental.gkd import GKDTrainer
from trl.trainer.utils import disable_dropout_in_model

from medistill_trl.coverage import Coverage
from medistill_trl.losses.comparisons import Comparison, SpanComparison, TokenComparison
from medistill_trl.losses.heads import OutputHead, states_before_head
from medistill_trl.losses.overlap import Fold
from medistill_trl.losses.span_kl import Reading, SpanBatch
from medistill_trl.losses.token_kl import completion_states
from medistill_trl.losses.token_means import TokenMeans
from medistill_trl.losses.token_terms import TemperatureRule
from medistill_trl.pair_writer import PairWriter
from medistill_trl.prompts import IGNORED
from medistill_trl.teacher import Completion, Sampling, complete, complete_in_parts, window_seed


class LogitKDTrainer(GKDTrainer):
    """`GKDTrainer` with the fused loss, on completions drawn a whole accumulation window at a time.

    Args:
        writer: Encodes completions for both models, and has the teacher write. Their prompts may differ, and
            so may their tokenizers: then they are compared over spans.
    """

    _name = "Logit-KD"
    asks_teacher = True  # for its states, at every step

    def __init__(self, *args, writer: PairWriter, **kwargs):
        # Without `GKDTrainer`'s, which would have DeepSpeed make an engine of a teacher of its own.
        super(GKDTrainer, self).__init__(
            *args,
            data_collator=writer.collator(),
            processing_class=writer.form.tokenizer,
            **kwargs,
        )
        if self.args.disable_dropout:
            disable_dropout_in_model(self.model)
        self.writer = writer
        self.fold = None
        if writer.tokenizers is not None:
            self.fold = Fold.of(writer.tokenizers.overlap, self.args.device)
        self.divergence = self.args.divergence_function()
        # compute_loss divides by the window's tokens itself: Trainer must not divide by its steps.
        self.model_accepts_loss_kwargs = True
        self._means = {"train": TokenMeans(), "eval": TokenMeans()}
        self._coverage = Coverage(self.args.min_coverage, self.is_world_process_zero())
        student = self.accelerator.unwrap_model(self.model)
        OutputHead.of(student).check(student)
        if self.asks_teacher:
            self.teacher_model = writer.teacher.model
            OutputHead.of(self.teacher_model).check(self.teacher_model)

    # --- completions -----------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """The window's micro-batches, and its completion tokens over all processes: dividing by them
        makes 1×8 and 8×1 the same step."""
        batches = list(islice(epoch_iterator, num_batches))
        examples = iter(self._examples([row for batch in batches for row in batch]))
        batches = [self.data_collator(list(islice(examples, len(batch)))) for batch in batches]
        num_items = self._get_num_items_in_batch(batches, device)
        if num_items is not None:
            self.writer.totals.trained += int(num_items)
        return batches, num_items

    def _examples(self, rows: list[dict]) -> list[dict]:
        """Encoded pairs: as stored, or on what the teacher, or the student itself, writes now."""
        seed = window_seed(self)
        draw = random.Random(seed)
        on_policy = [draw.random() < self.args.lmbda for _ in rows]
        examples = [row["example"] for row in rows]
        own = [n for n, drawn in enumerate(on_policy) if drawn]
        asked = [n for n, drawn in enumerate(on_policy) if not drawn and examples[n] is None]
        for n, completion in zip(
            own, self._student_writes([rows[n] for n in own], seed), strict=True
        ):
            example = self.writer.encode(rows[n]["question"], completion, by_student=True)
            examples[n] = example | {"on_policy": True}
        written = self.writer.complete([rows[n]["question"] for n in asked], seed)
        for n, completion in zip(asked, written, strict=True):
            examples[n] = self.writer.encode(rows[n]["question"], completion)
        return examples

    def _student_writes(self, rows: list[dict], seed: int) -> list[Completion]:
        student, form = self.accelerator.unwrap_model(self.model), self.writer.form
        sampling = Sampling(self.args.max_new_tokens, self.args.temperature)

        def write(prompts, sampling, seed):
            with self.accelerator.autocast():
                return complete(student, form, prompts, sampling, seed)

        prompts = [form.render(row["question"]) for row in rows]
        completions = complete_in_parts(write, prompts, sampling, seed, self.writer.batch_size)
        written = sum(len(c.token_ids) + (c.end_id is not None) for c in completions)
        self.writer.totals.generated_student += written
        return completions

    # --- the loss --------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Without `GKDTrainer`'s, which would draw completions once more."""
        return super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = self.accelerator.unwrap_model(model)
        hidden_BTH, _ = states_before_head(model, student, inputs)
        comparison = self._comparison(student, hidden_BTH, inputs)
        parts = [(comparison, self.args.alpha)]
        if self.args.lmbda > 0:
            own_B = inputs["on_policy"]
            parts = [
                (comparison.of_examples(~own_B), self.args.alpha),
                (comparison.of_examples(own_B), None),
            ]
        loss = sum(self._distil(part, alpha) for part, alpha in parts)
        tokens = len(comparison.student.tokens)
        loss = loss / (max(1, tokens) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over processes
        return (loss, ModelOutput()) if return_outputs else loss

    def _comparison(
        self, student: PreTrainedModel, hidden_BTH: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> Comparison:
        labels = inputs["labels"], inputs["teacher_labels"]
        states_NH, targets_N = completion_states(hidden_BTH, labels[0])
        teacher_MH, teacher_targets_M = self._teacher_states(inputs)
        ours = Reading(states_NH, targets_N, OutputHead.of(student))
        theirs = Reading(
            teacher_MH.to(states_NH.device),
            teacher_targets_M.to(states_NH.device),
            OutputHead.of(self.writer.teacher.model),
        )
        counts_B2 = torch.stack([(side != IGNORED).sum(1) for side in labels], 1)
        chunk = self.args.loss_chunk_size
        if self.fold is not None:
            batch = SpanBatch(inputs["spans"], inputs["one_to_one"])
            return SpanComparison(ours, theirs, batch, counts_B2, self.fold, chunk)
        compared_N = inputs["compared"][:, 1:][labels[0][:, 1:] != IGNORED]
        return TokenComparison(ours, theirs, compared_N, counts_B2[:, 0], self.writer.shared, chunk)

    def _distil(self, comparison: Comparison, alpha: float | None) -> torch.Tensor:
        """The sum over tokens; α None stands for the student's own completions: α·T²·D and no CE."""
        temperature, weights_C = self._temperatures(comparison)
        with self.accelerator.autocast():
            loss, sums = comparison.loss(
                1.0 if alpha is None else alpha, temperature, self.divergence, weights_C
            )
        self._record(sums)
        return loss if alpha is not None else self.args.alpha * loss

    def _temperatures(
        self, comparison: Comparison
    ) -> tuple[float | torch.Tensor | TemperatureRule, torch.Tensor | None]:
        """Temperature of the divergence and weight of what is compared; here the same for all."""
        return self.args.kd_temperature, None

    @torch.no_grad()
    def _teacher_states(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.writer.teacher.model
        states = model.get_decoder()(
            input_ids=inputs["teacher_input_ids"].to(model.device),
            attention_mask=inputs["teacher_attention_mask"].to(model.device),
            use_cache=False,
        ).last_hidden_state
        return completion_states(states, inputs["teacher_labels"].to(model.device))

    # --- the log ---------------------------------------------------------------------------------

    def _record(self, sums: dict[str, torch.Tensor]) -> None:
        self._means[self._mode].add(sums)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means per completion token since the last log, over all processes."""
        prefix = "" if self._mode == "train" else "eval_"
        means = self._means[self._mode].take(self.accelerator)
        self._coverage.check(means)
        super().log({**logs, **{prefix + name: value for name, value in means.items()}}, start_time)
