"""Cross-entropy on the teacher's completions, and the distance between both models' attention on them.

Shapes: B batch, T time, N completion tokens of the batch, H hidden size.
"""

import logging
from collections.abc import Iterator
from itertools import islice

import torch
from transformers.utils import ModelOutput
from trl import SFTTrainer

from medistill_trl.coverage import Coverage, span_counts
from medistill_trl.layers import run_through
from medistill_trl.losses.attention import AttentionInputs, attention_loss
from medistill_trl.losses.heads import OutputHead, states_before_head
from medistill_trl.losses.span_attention import span_attention_loss, span_rows
from medistill_trl.losses.token_kl import cross_entropy
from medistill_trl.losses.token_means import TokenMeans
from medistill_trl.methods.attention.capture import captured_attention, check_attention
from medistill_trl.pair_writer import PairWriter
from medistill_trl.prompts import IGNORED
from medistill_trl.teacher import window_seed

logger = logging.getLogger(__name__)

LOGGED = {"map_mse": "map_mse", "row_kl": "row_kl_nats", "relations": "relation_kl_nats"}


class AttentionTrainer(SFTTrainer):
    """`SFTTrainer` with the attention loss, on completions drawn a whole accumulation window at a time.

    Args:
        writer: Has the teacher write, and encodes what it wrote after the student's prompt for both.
        pairs: (student layer, teacher layer), counted from 1.
        relation_heads: R of `losses.attention`, for relations; None otherwise.

    Raises:
        ValueError: reentrant gradient checkpointing, which hides the queries' gradients from the loss.
        UserError: a model whose attention is not understood here.
    """

    _name = "Attention transfer"

    def __init__(
        self,
        *args,
        writer: PairWriter,
        pairs: list[tuple[int, int]],
        relation_heads: int | None,
        **kwargs,
    ):
        tokenizer = writer.form.tokenizer
        super().__init__(
            *args,
            data_collator=writer.collator(),
            processing_class=tokenizer,
            **kwargs,
        )
        options = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and options.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs: use_reentrant must be false; with true a block's inside has no "
                "gradients, and so neither has the attention loss"
            )
        self.writer = writer
        self.teacher = writer.teacher.model
        self.pairs = pairs
        self.student_layers, self.teacher_layers = zip(*pairs, strict=True)
        self.relation_heads = relation_heads
        # compute_loss divides by what the window holds itself: Trainer must not divide by its steps.
        self.model_accepts_loss_kwargs = True
        # Cross-entropy per token, attention per row, which are others, and spans, without regard to alpha.
        self._means = {
            mode: (TokenMeans(), TokenMeans(), TokenMeans()) for mode in ("train", "eval")
        }
        self._coverage = Coverage(self.args.min_coverage, self.is_world_process_zero())
        student = self.accelerator.unwrap_model(self.model)
        OutputHead.of(student).check(student)
        check_attention(student, self.student_layers)
        check_attention(self.teacher, self.teacher_layers)
        logger.info("%s", self._description())

    def _description(self) -> str:
        mapping = ", ".join(f"{teacher} → {student}" for student, teacher in self.pairs)
        rows = f"{self.args.attention_rows} rows"
        over = "averaged" if self.args.attention_reduction == "mean" else "summed"
        heads = "summed" if self.args.attention_loss == "map_mse" else "averaged"
        return (
            f"attention loss {self.args.attention_loss}, teacher layer → student layer {mapping}: summed over "
            f"pairs, {heads} over heads, {over} over {rows}"
        )

    # --- completions -----------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """The window's micro-batches, and its completion tokens over all processes; each batch knows the
        window's rows too. Dividing by them makes 1×8 and 8×1 the same step."""
        batches = list(islice(epoch_iterator, num_batches))
        rows = [row for batch in batches for row in batch]
        examples = iter(self.writer.examples(rows, window_seed(self)))
        batches = [self.data_collator(list(islice(examples, len(batch)))) for batch in batches]
        num_items = self._get_num_items_in_batch(batches, device)
        if num_items is not None:
            self.writer.totals.trained += int(num_items)
            num_rows = sum(self._rows(batch).sum() for batch in batches).to(device)
            if self.args.average_tokens_across_devices:
                num_rows = self.accelerator.gather(num_rows).sum()
            for batch in batches:
                batch["num_rows"] = num_rows
        return batches, num_items

    # --- the loss --------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        alpha = self.args.alpha
        student = self.accelerator.unwrap_model(model)
        if self.writer.tokenizers is not None:
            self._means[self._mode][2].add(span_counts(inputs))
        # The teacher goes first, so that what its forward needs is gone when the student's is kept.
        teacher = self._teacher_attention(inputs) if alpha > 0 else []
        with captured_attention(student, self.student_layers) as captured:
            hidden_BTH, last_logits = states_before_head(model, student, inputs)
        attention = [captured[layer].inputs() for layer in self.student_layers]
        if alpha < 1:
            tokens = num_items_in_batch
            if tokens is None:
                tokens = (inputs["labels"] != IGNORED).sum().clamp_min(1)
            loss = (1 - alpha) * self._cross_entropy(student, hidden_BTH, inputs) / tokens
        else:
            # DDP waits for every trained weight's gradient, also of those behind the last mapped layer.
            loss = 0 * last_logits.sum()
        if alpha > 0:
            loss = loss + alpha * self._attention_loss(attention, teacher, inputs)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over processes
        return (loss, ModelOutput()) if return_outputs else loss

    def _cross_entropy(
        self, student, hidden_BTH: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Summed over completion tokens."""
        with self.accelerator.autocast():
            loss, sums = cross_entropy(
                hidden_BTH, inputs["labels"], OutputHead.of(student), self.args.loss_chunk_size
            )
        self._means[self._mode][0].add(sums)
        return loss

    def _attention_loss(
        self,
        student: list[AttentionInputs],
        teacher: list[AttentionInputs],
        inputs: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Summed over layer pairs; over rows the mean of the window, or the sum."""
        rows, kind = self._rows(inputs), self.args.attention_loss
        name, loss = LOGGED[kind], 0.0
        sums = {"tokens": rows.sum().float()}
        if self.writer.tokenizers is not None:
            function, places = (
                span_attention_loss,
                (inputs["span_of"], inputs["teacher_span_of"], rows),
            )
        else:
            function, places = attention_loss, (rows, inputs["attention_mask"].bool())
        for pair, own, its in zip(self.pairs, student, teacher, strict=True):
            total = function(
                own,
                its,
                *places,
                kind=kind,
                mean_heads=not self.args.match_all_heads,
                relation_heads=self.relation_heads,
                chunk_size=self.args.attention_chunk_size,
            )
            loss = loss + total
            sums["_".join(map(str, (name, *pair)))] = total.detach()
        self._means[self._mode][1].add(sums | {name: loss.detach()})
        if self.args.attention_reduction == "sum":
            return loss
        return loss / inputs.get("num_rows", rows.sum()).clamp_min(1)

    @torch.no_grad()
    def _teacher_attention(self, inputs: dict[str, torch.Tensor]) -> list[AttentionInputs]:
        with captured_attention(self.teacher, self.teacher_layers) as captured:
            run_through(
                self.teacher,
                max(self.teacher_layers),
                inputs["teacher_input_ids"],
                inputs["teacher_attention_mask"],
            )
        device = inputs["input_ids"].device
        found = (captured[layer].inputs() for layer in self.teacher_layers)
        return [
            AttentionInputs(*(states.to(device) for states in one[:3]), one.scaling)
            for one in found
        ]

    def _rows(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Which rows count, (B, T): those of the teacher's tokens, or of all; or (B, S), those of spans."""
        if self.writer.tokenizers is not None:
            return span_rows(inputs["span_of"], inputs["row_counts"].bool())
        name = "attention_mask" if self.args.attention_rows == "all" else "compared"
        return inputs[name].bool()

    # --- the log ---------------------------------------------------------------------------------

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means per completion token and per row since the last log, over all processes."""
        prefix = "" if self._mode == "train" else "eval_"
        means = {}
        for collected in self._means[self._mode]:
            means |= collected.take(self.accelerator)
        self._coverage.check(means)
        super().log({**logs, **{prefix + name: value for name, value in means.items()}}, start_time)
