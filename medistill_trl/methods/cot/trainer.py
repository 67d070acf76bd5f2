"""The trainer: cross-entropy with a weight for rationale tokens and another for answer tokens.

Shapes: B batch, T time, N completion tokens of the batch, H hidden size.
"""

from collections.abc import Iterator

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from medistill_trl.checkpoints import Totals
from medistill_trl.losses.heads import OutputHead, states_before_head
from medistill_trl.losses.token_kl import completion_states, distillation_loss
from medistill_trl.losses.token_means import TokenMeans
from medistill_trl.prompts import IGNORED, PromptFormat


class RationaleCollator(DataCollatorForLanguageModeling):
    """Pads tokenized examples and the mask that tells rationale from answer."""

    def torch_call(self, examples):
        masks = [torch.tensor(example["rationale_mask"]) for example in examples]
        return super().torch_call(examples) | {"rationale_mask": pad_sequence(masks, True, 0)}


class CoTTrainer(SFTTrainer):
    """`SFTTrainer` that can weigh rationale and answer differently.

    Args:
        form: The student's prompt format.
        totals: Where tokens are counted.
    """

    _name = "Chain of thought"

    def __init__(self, *args, form: PromptFormat, totals: Totals, **kwargs):
        collator = RationaleCollator(pad_token_id=form.tokenizer.pad_token_id)
        super().__init__(*args, data_collator=collator, processing_class=form.tokenizer, **kwargs)
        self.totals = totals
        self.uniform = self.args.rationale_weight == self.args.answer_weight
        self._means = {"rationale": TokenMeans(), "answer": TokenMeans()}
        if not self.uniform:
            # compute_loss divides by the window's weight itself: Trainer must not divide by its steps.
            self.model_accepts_loss_kwargs = True
            student = self.accelerator.unwrap_model(self.model)
            OutputHead.of(student).check(student)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """The window's micro-batches, and what its loss is divided by: the weight of its completion
        tokens over all processes, which makes 1×8 and 8×1 the same step."""
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_tokens is None:
            return batches, None
        self.totals.trained += int(num_tokens)
        if self.uniform:
            return batches, num_tokens
        rationale = sum(batch["rationale_mask"].sum() for batch in batches).to(device)
        if self.args.average_tokens_across_devices:
            rationale = self.accelerator.gather(rationale).sum()
        answer = num_tokens - rationale
        return batches, self.args.rationale_weight * rationale + self.args.answer_weight * answer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask_BT = inputs.pop("rationale_mask")
        if self.uniform or not model.training:  # evaluation is on plain completions
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        student = self.accelerator.unwrap_model(model)
        hidden_BTH, _ = states_before_head(model, student, inputs)
        states_NH, targets_N = completion_states(hidden_BTH, inputs["labels"])
        rationale_N = mask_BT[:, 1:][inputs["labels"][:, 1:] != IGNORED].bool()
        parts = {
            "rationale": (rationale_N, self.args.rationale_weight),
            "answer": (~rationale_N, self.args.answer_weight),
        }
        loss = sum(
            weight * self._cross_entropy(student, part, states_NH[rows], targets_N[rows])
            for part, (rows, weight) in parts.items()
        )
        # A window may hold nothing that has weight.
        loss = loss / num_items_in_batch.clamp_min(torch.finfo(torch.float32).tiny)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over processes
        return (loss, ModelOutput()) if return_outputs else loss

    def _cross_entropy(
        self,
        student: PreTrainedModel,
        part: str,
        states_NH: torch.Tensor,
        targets_N: torch.Tensor,
    ) -> torch.Tensor:
        """The sum over one part's tokens."""
        with self.accelerator.autocast():
            loss, sums = distillation_loss(
                states_NH,
                targets_N,
                OutputHead.of(student),
                alpha=0.0,
                chunk_size=self.args.loss_chunk_size,
            )
        self._means[part].add(sums)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds, where weights differ, the means of each part's tokens since the last log."""
        if self.model.training:
            for part, means in self._means.items():
                taken = means.take(self.accelerator)
                logs = logs | {f"{part}_{name}": value for name, value in taken.items()}
        super().log(logs, start_time)
