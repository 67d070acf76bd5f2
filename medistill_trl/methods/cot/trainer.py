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
from medistill_trl.losses.token_kl import cross_entropy
from medistill_trl.losses.token_means import TokenMeans
from medistill_trl.prompts import IGNORED, PromptFormat

# Prefixes in the log, each of means over its own tokens.
TRAINED = ("", "rationale_", "answer_")
EVALUATED = "eval_"


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
        self._means = {part: TokenMeans() for part in (*TRAINED, EVALUATED)}
        # As in SFT, other losses are TRL's; they know no weights.
        self.own_loss = not self.uniform or (
            self.args.loss_type == "chunked_nll" and not self.aux_loss_enabled
        )
        if self.own_loss:
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
        if not self.own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        student = self.accelerator.unwrap_model(model)
        hidden_BTH, _ = states_before_head(model, student, inputs)
        parts = self._parts(inputs["labels"], mask_BT)
        loss = sum(
            weight * self._cross_entropy(student, part, hidden_BTH, labels_BT)
            for part, (labels_BT, weight) in parts.items()
        )
        # A window may hold nothing that has weight.
        loss = loss / num_items_in_batch.clamp_min(torch.finfo(torch.float32).tiny)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over processes
        return (loss, ModelOutput()) if return_outputs else loss

    def _parts(
        self, labels_BT: torch.Tensor, mask_BT: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, float]]:
        """What is weighed alike: prefix in the log → its labels and its weight."""
        if not self.model.training:  # on plain completions
            return {EVALUATED: (labels_BT, 1.0)}
        if self.uniform:
            return {"": (labels_BT, 1.0)}
        rationale_BT = mask_BT.bool()
        return {
            "rationale_": (labels_BT.where(rationale_BT, IGNORED), self.args.rationale_weight),
            "answer_": (labels_BT.where(~rationale_BT, IGNORED), self.args.answer_weight),
        }

    def _cross_entropy(
        self,
        student: PreTrainedModel,
        part: str,
        hidden_BTH: torch.Tensor,
        labels_BT: torch.Tensor,
    ) -> torch.Tensor:
        """The sum over one part's tokens."""
        with self.accelerator.autocast():
            loss, sums = cross_entropy(
                hidden_BTH, labels_BT, OutputHead.of(student), self.args.loss_chunk_size
            )
        self._means[part].add(sums)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over tokens since the last log; where weights differ, of each part."""
        for part in TRAINED if self.model.training else (EVALUATED,):
            taken = self._means[part].take(self.accelerator)
            logs |= {f"{part}{name}": value for name, value in taken.items()}  # evaluate returns it
        super().log(logs, start_time)
