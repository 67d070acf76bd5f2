"""SPIN runs on tiny models, for the tests: settings, trainers, and what a run leaves."""

import json

import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from medistill_trl import methods
from medistill_trl.arguments import DataArguments, RunArguments, StudentArguments, TeacherArguments
from medistill_trl.checkpoints import Totals
from medistill_trl.completion_store import CompletionStore
from medistill_trl.data import Prompt
from medistill_trl.heldout import HeldoutCheck
from medistill_trl.methods.spin import SpinConfig
from medistill_trl.models import _set_generation
from medistill_trl.pipeline import build_trainer
from medistill_trl.prompts import PromptFormat
from medistill_trl.setting import Arguments, Setting
from medistill_trl.teacher import Teacher

PROMPTS = [
    Prompt(f"p{i}", "s", f"What causes condition number {i}?" + " Explain." * (i % 4), "r")
    for i in range(8)
]


def make_form(**kwargs):
    tokenizer = make_tokenizer(**kwargs)
    tokenizer.pad_token = "<|endoftext|>"
    return PromptFormat(tokenizer)


TINY = {
    "num_iterations": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
    "generation_batch_size": 3,
    "max_length": 200,
}
FORM = make_form()
# The loss before any step, in one batch.
ONE_STEP = {"num_iterations": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def make_setting(
    tmp_path, lora=True, teacher_form=FORM, teacher_model=None, dtype=None, **training
) -> Setting:
    form = FORM
    if teacher_model is None:
        teacher_model = make_model(len(teacher_form.tokenizer), seed=1)
    _set_generation(teacher_model.requires_grad_(False).eval(), teacher_form.tokenizer)
    teacher = Teacher(teacher_model, teacher_form.tokenizer, teacher_form, "t")
    student = make_model(len(form.tokenizer), layers=2, seed=2)
    _set_generation(student, form.tokenizer)
    if lora:
        torch.manual_seed(0)
        student = get_peft_model(
            student, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        )
    if dtype is not None:  # as TRL casts the adapter of a quantised student
        for parameter in student.parameters():
            parameter.data = parameter.data.to(dtype if parameter.requires_grad else torch.float32)
    store = CompletionStore(tmp_path / "c.sqlite")
    config = SpinConfig(output_dir=str(tmp_path / "checkpoints"), **{**TINY, **training})
    arguments = Arguments(
        RunArguments(method="spin"),
        StudentArguments(student_model="s", use_lora=lora),
        TeacherArguments("t", teacher_max_new_tokens=10, teacher_completions="stored"),
        DataArguments(train_file="t", validation_file="v", max_prompt_tokens=150),
        config,
    )
    heldout = HeldoutCheck.prepare(form, teacher, PROMPTS[:2], store, 10, None)
    return Setting(arguments, student, form, teacher, store, PROMPTS, heldout, Totals())


def make_trainer(tmp_path, **kwargs):
    return build_trainer(methods.load("spin"), make_setting(tmp_path, **kwargs))


def trained(tmp_path, checkpoint=None, **kwargs):
    trainer = make_trainer(tmp_path, **kwargs)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


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
