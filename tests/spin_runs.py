"""SPIN runs on tiny models, for the tests: settings, trainers, and what a run leaves."""

import json

import tiny_setting
import torch
from tiny_setting import make_form

from medistill_trl import methods
from medistill_trl.pipeline import build_trainer
from medistill_trl.setting import Setting

TINY = {
    "num_iterations": 3,
    "max_steps": -1,
    "learning_rate": 3e-3,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "generation_batch_size": 3,
    "max_length": 200,
}
FORM = make_form()
# The loss before any step, in one batch.
ONE_STEP = {"num_iterations": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def make_setting(folder, lora=True, dtype=None, **changes) -> Setting:
    """With the weights cast to `dtype`, as TRL casts the adapter of a quantised student."""
    setting = tiny_setting.make_setting(
        folder,
        "spin",
        lora=lora,
        teacher={"teacher_completions": "stored"},
        data={"max_prompt_tokens": 150},
        **{**TINY, **changes},
    )
    if dtype is not None:
        for parameter in setting.student.parameters():
            parameter.data = parameter.data.to(dtype if parameter.requires_grad else torch.float32)
    return setting


def make_trainer(tmp_path, **kwargs):
    return build_trainer(methods.load("spin"), make_setting(tmp_path, **kwargs))


def trained(tmp_path, checkpoint=None, **kwargs):
    trainer = make_trainer(tmp_path, **kwargs)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def policy(trainer):
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def same(one, other):
    return len(one) == len(other) > 0 and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def records(folder):
    return json.loads((folder / "results/spin_iterations.json").read_text())["iterations"]


def answers(folder, number):
    lines = (folder / f"rounds/round-{number}.jsonl").read_text().splitlines()[1:]
    return {row["id"]: row["rejected"] for row in map(json.loads, lines)}
