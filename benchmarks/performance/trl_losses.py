"""TRL's own losses on the micro-batches of our trainers, where there is one that computes the same kind of thing.

Ours extend TRL's trainers, so each loss is called as the parent's method on our trainer.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import DPOTrainer, GRPOTrainer, SFTTrainer
from trl.experimental.gkd import GKDTrainer

from benchmarks.performance.bare_steps import Batch, Taken
from medistill_trl.prompts import IGNORED


def gkd(taken: Taken, batch: Batch) -> torch.Tensor:
    """Forward KL (beta 0) on whole logits; both models read the student's prompt."""
    trainer = SimpleNamespace(
        use_liger_gkd_loss=False,
        teacher_model=taken.setting.teacher.model,
        beta=0.0,
        generalized_jsd_loss=GKDTrainer.generalized_jsd_loss,
    )
    return GKDTrainer.compute_loss(
        trainer, taken.setting.student, batch, num_items_in_batch=taken.num_items
    )


def sft(taken: Taken, batch: Batch) -> torch.Tensor:
    """The default of SFTTrainer, chunked, with what it logs."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return SFTTrainer.compute_loss(
        taken.trainer, taken.setting.student, inputs, num_items_in_batch=taken.num_items
    )


def dpo(taken: Taken, batch: Batch) -> torch.Tensor:
    """The sigmoid loss against the reference adapter, with what DPOTrainer logs."""
    inputs = {name: values for name, values in batch.items() if name != "weights"}
    return DPOTrainer.compute_loss(taken.trainer, taken.setting.student, inputs)


def grpo(taken: Taken, batch: Batch) -> torch.Tensor:
    """The clipped loss on the same samples, with advantage 1 for each."""
    inputs = samples_for_grpo(batch, taken.setting.form.tokenizer.pad_token_id)
    inputs["num_items_in_batch"] = torch.as_tensor(taken.num_items)
    return GRPOTrainer._compute_loss(taken.trainer, taken.setting.student, inputs)


def samples_for_grpo(batch: Batch, pad_token_id: int) -> Batch:
    """Prompts padded on the left and completions on the right, as GRPOTrainer keeps them."""
    columns = {"prompt": [], "completion": []}
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True
    ):
        written = labels != IGNORED
        columns["prompt"].append(ids[mask & ~written])
        columns["completion"].append(ids[written])
    found = {"advantages": torch.ones(len(batch["labels"]))}
    for name, rows in columns.items():
        side = "left" if name == "prompt" else "right"
        found[f"{name}_ids"] = pad_sequence(rows, True, pad_token_id, padding_side=side)
        ones = [torch.ones_like(row) for row in rows]
        found[f"{name}_mask"] = pad_sequence(ones, True, padding_side=side)
    return found


TRL: dict[str, Callable[[Taken, Batch], torch.Tensor]] = {
    "sft": sft,
    "cot": sft,
    "logit_kd": gkd,
    "adakd": gkd,
    "spin": dpo,
    "on_policy": grpo,
}
NAMES = {sft: "SFTTrainer", gkd: "GKDTrainer", dpo: "DPOTrainer", grpo: "GRPOTrainer"}
# Method → why there is nothing to compare its loss with.
WHY_NOT = {
    "fitnets": "SFTTrainer has no teacher",
    "attention": "SFTTrainer has no teacher",
    "bond": "GRPOTrainer learns from all N samples, BOND from one",
    "ppo": "PPOTrainer wants a reward model and a value model, each as large as the student, and has a loop of its own",
}
