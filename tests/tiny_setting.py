"""A tiny pair, loaded as a run would load it, to build any method's trainer from."""

import copy

import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from medistill_trl import methods
from medistill_trl.arguments import DataArguments, RunArguments, StudentArguments, TeacherArguments
from medistill_trl.checkpoints import Totals
from medistill_trl.completion_store import CompletionStore
from medistill_trl.data import Prompt
from medistill_trl.heldout import HeldoutCheck
from medistill_trl.inputs import Loaded
from medistill_trl.models import set_generation
from medistill_trl.prompts import PromptFormat
from medistill_trl.setting import Arguments, Setting
from medistill_trl.teacher import Teacher

PROMPTS = [
    Prompt(f"p{i}", "s", f"What causes condition number {i}?" + " Explain." * (i % 4), "r", "yes")
    for i in range(8)
]
TRAINING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
}
# Eight rows in one micro-batch: the first loss is that of the student as it came.
ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def make_form(**kwargs) -> PromptFormat:
    """Of a tokenizer from `make_tokenizer`, with a pad token of its own."""
    tokenizer = make_tokenizer(**kwargs)
    tokenizer.pad_token = "<|endoftext|>"
    return PromptFormat(tokenizer)


def make_setting(
    folder,
    method,
    *,
    lora=False,
    prompts=PROMPTS,
    form=None,
    teacher_form=None,
    teacher_model=None,
    student=None,
    run=(),
    teacher=(),
    data=(),
    **training,
) -> Setting:
    """Everything a method gets. The student has two layers, the teacher four and other weights.

    Args:
        folder: For the completion store and checkpoints.
        method: Its name.
        lora: Wrap the student.
        form: The student's prompt format.
        teacher_form: Of another tokenizer than the student's.
        teacher_model, student: Instead of those made here.
        run, teacher, data: Changes to these arguments.
        training: Changes to `TRAINING`.
    """
    form = form or make_form()
    teacher_form = teacher_form or form
    if teacher_model is None:
        teacher_model = make_model(len(teacher_form.tokenizer), seed=1)
    if student is None:
        student = make_model(len(form.tokenizer), layers=2, seed=training.get("seed", 2))
    set_generation(teacher_model.requires_grad_(False).eval(), teacher_form.tokenizer)
    set_generation(student, form.tokenizer)
    if lora:
        torch.manual_seed(0)
        adapter = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules="all-linear")
        student = get_peft_model(student, adapter)
    arguments = Arguments(
        RunArguments(**{"method": method, **dict(run)}),
        StudentArguments(student_model="s", use_lora=lora),
        TeacherArguments(
            **{"teacher_model": "t", "teacher_max_new_tokens": 10, **dict(teacher)},
        ),
        DataArguments(**{"train_file": "t", "validation_file": "v", **dict(data)}),
        methods.load(method).config(
            output_dir=str(folder / "checkpoints"), **{**TRAINING, **training}
        ),
    )
    judge = Teacher(teacher_model, teacher_form.tokenizer, teacher_form, "t")
    store = CompletionStore(folder / "c.sqlite")
    heldout = HeldoutCheck.prepare(form, judge, prompts[:2], store, 10, None)
    return Setting(arguments, student, form, judge, store, prompts, heldout, Totals())


def check(setting: Setting) -> None:
    """What the method refuses before any weights are loaded."""
    forms = setting.form, setting.teacher.form
    loaded = Loaded(None, None, *forms, setting.train_prompts, setting.heldout.prompts, [])
    methods.load(setting.arguments.run.method).check(setting.arguments, loaded)


def train(setting, resume=None):
    """The setting, its trainer after training, and the student's weights before it."""
    trainer = methods.load(setting.arguments.run.method).build(setting)
    before = copy.deepcopy(setting.student.state_dict())
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return setting, trainer, before


def logged(trainer, name="loss") -> list[float]:
    """What training steps logged under a name, in order."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry[name] for entry in steps if name in entry]


def weights(setting: Setting) -> torch.Tensor:
    """All of the student's weights in one vector."""
    return torch.cat([p.detach().flatten() for p in setting.student.parameters()])
