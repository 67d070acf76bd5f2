"""Stops a run whose numbers have gone wrong, before they reach the weights, and keeps what caused it."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import DistributedType, gather_object
from transformers import PreTrainedModel, Trainer, TrainerCallback

from medistill_trl.errors import NonFinite, RunFailed
from medistill_trl.files import write_text

WHOLE_MODEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


@contextmanager
def kept_for_a_look(folder: Path) -> Iterator[None]:
    """Save what a number that is not finite came from, and name the file in the message.

    Args:
        folder: For `nonfinite_<process>.json`.
    """
    try:
        yield
    except NonFinite as error:
        path = folder / f"nonfinite_{os.environ.get('RANK', '0')}.json"
        content = {"problem": str(error), "rows": error.rows}
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        raise RunFailed(f"{error}\nThe texts and tokens it came from are in {path}") from error


class FiniteGuard(TrainerCallback):
    """Raises before the optimizer step if the loss or a gradient is NaN or infinite, whatever the method.

    Left alone, transformers logs `loss: 0.0, grad_norm: nan`, writes NaN into the weights and exits
    with status 0. One synchronisation per optimizer step. What is generated, and what is rewarded, is checked
    where that happens: `teacher.complete`, `rewards.TeacherReward`.

    Args:
        trainer: Its micro-batches are remembered until the step they belong to is taken.
        teacher: Asked for its logits once something is wrong; None if it does not read the student's tokens.
    """

    def __init__(self, trainer: Trainer, teacher: PreTrainedModel | None = None):
        self.trainer = trainer
        self.teacher = teacher
        self._window: list[tuple[dict, torch.Tensor]] = []
        step = trainer.training_step

        def remembered(model, inputs, num_items_in_batch=None):
            loss = step(model, inputs, num_items_in_batch)
            self._window.append((inputs, loss))
            return loss

        trainer.training_step = remembered

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        window, self._window = self._window, []
        losses = torch.stack([loss for _, loss in window])
        norm = self._gradient_norm(model).to(losses.device)
        fine = torch.isfinite(losses).all() & torch.isfinite(norm)
        # Gradients are the same everywhere; losses need not be.
        if bool(self.trainer.accelerator.gather(fine[None]).all()):
            return
        # The first micro-batch with such a loss, or all of them if a gradient alone has gone wrong.
        bad = [n for n, finite in enumerate(torch.isfinite(losses).tolist()) if not finite][:1]
        rows = [row for n in bad or range(len(window)) for row in self._rows(n, *window[n])]
        rows = gather_object(rows)
        raise NonFinite(
            f"step {state.global_step + 1}: the loss is {losses.sum().item()} and the gradient norm {norm.item()}; "
            f"{self._blame([batch for n, (batch, _) in enumerate(window) if n in bad])}. "
            "The optimizer step was not taken, and the last checkpoint is intact. Lower learning_rate, "
            "check the dtypes (float16 overflows, bfloat16 does not), then --resume or start anew.",
            rows,
        )

    def _gradient_norm(self, model: PreTrainedModel) -> torch.Tensor:
        accelerator = self.trainer.accelerator
        if accelerator.distributed_type in WHOLE_MODEL:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            return torch.nn.utils.get_total_norm(gradients)
        # DeepSpeed has already taken the step, unless this is not finite.
        return torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), math.inf))

    def _rows(self, number: int, batch: dict, loss: torch.Tensor) -> list[dict]:
        """Of one micro-batch, for a reader."""
        ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"].bool()
        numbers = {
            name: f"{(~tensor.isfinite()).sum().item()} of {tensor.numel()} not finite"
            for name, tensor in batch.items()
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        }
        found = []
        for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True):
            ids = ids_T[mask_T].tolist()
            found.append(
                {
                    "process": self.trainer.args.process_index,
                    "micro_batch": number,
                    "loss": str(loss.item()),
                    "text": self.trainer.processing_class.decode(ids),
                    "input_ids": ids,
                    **numbers,
                }
            )
        return found

    @torch.no_grad()
    def _blame(self, batches: list[dict]) -> str:
        """Whose logits on the batch are not finite, in words."""
        trainer = self.trainer
        if not batches or trainer.accelerator.distributed_type not in WHOLE_MODEL:
            return "its loss is of many batches or of another process's"
        ids, mask = (
            batches[0][name].to(trainer.args.device) for name in ("input_ids", "attention_mask")
        )
        models = {"student": trainer.accelerator.unwrap_model(trainer.model)}
        if self.teacher is not None and ids.max() < self.teacher.config.vocab_size:
            models["teacher"] = self.teacher
        verdicts = []
        for name, model in models.items():
            finite = all(  # a row at a time: there may be little memory left
                bool(torch.isfinite(model(input_ids=row[kept][None].to(model.device)).logits).all())
                for row, kept in zip(ids, mask.bool(), strict=True)
            )
            verdicts.append(f"the {name}'s logits on it are {'' if finite else 'not '}finite")
        return ", ".join(verdicts)


def require_finite(number: float, what: str) -> None:
    """Raises RunFailed for a measurement that nobody could use."""
    if not math.isfinite(number):
        raise RunFailed(
            f"{what} is {number}: a model's weights or its dtype are broken, and nothing is reported. Go back to a "
            "checkpoint from before, or check the dtypes (float16 overflows, bfloat16 does not)"
        )
