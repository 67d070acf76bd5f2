"""Crafted teacher outputs where a run looks for them: in its completion store."""

import copy
from types import SimpleNamespace

import torch
from conftest import make_model, make_tokenizer

from medistill_trl import methods
from medistill_trl.arguments import DataArguments, RunArguments, StudentArguments, TeacherArguments
from medistill_trl.checkpoints import Totals
from medistill_trl.completion_store import CompletionStore, _request
from medistill_trl.data import Prompt
from medistill_trl.heldout import HeldoutCheck
from medistill_trl.models import _set_generation
from medistill_trl.prompts import PromptFormat
from medistill_trl.setting import Arguments, Setting
from medistill_trl.teacher import Completion, Sampling, Teacher


def store_completions(
    store: CompletionStore,
    identity: str,
    form: PromptFormat,
    sampling: Sampling,
    texts: dict[str, list[str]],
) -> None:
    """As if the teacher had answered each question with these texts, its own end token after each.

    Args:
        identity: The teacher's, as stored completions are addressed.
        form: The teacher's prompt format.
    """
    teacher = SimpleNamespace(identity=identity)
    end = form.tokenizer.eos_token_id
    for question, samples in texts.items():
        requests = [
            _request(teacher, form.render(question), sampling, index)
            for index in range(len(samples))
        ]
        completions = [
            Completion(text, form.tokenizer(text)["input_ids"], True, end) for text in samples
        ]
        store._put(teacher, sampling, zip(requests, completions, strict=True))


# --- a setting with tiny models and crafted rationales ---------------------------------------------

REASON = "The wrist cannot be raised, so the nerve of its extensors is hurt."
PROMPTS = [
    Prompt(
        f"p{i}",
        "s",
        f"Which nerve is hurt in case {i}?" + " Explain." * (i % 3),
        "r",
        "radial nerve",
    )
    for i in range(8)
]
TINY = {
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
    "rationale_max_new_tokens": 24,
    "num_rationales": 3,
}


def make_form(**kwargs):
    tokenizer = make_tokenizer(**kwargs)
    tokenizer.pad_token = "<|endoftext|>"
    return PromptFormat(tokenizer)


def crafted(number, *others):
    """A good rationale, a wrong one, one without separator; in another order each time."""
    texts = [
        f"{REASON} This is case {number}.\n\nFinal answer: Radial nerve",
        f"{REASON}\n\nFinal answer: ulnar nerve",
        "It is the radial nerve.",
        *others,
    ]
    return texts[number % len(texts) :] + texts[: number % len(texts)]


def make_setting(
    tmp_path, texts=None, teacher_form=None, prompts=PROMPTS, resume=False, **training
):
    """Crafted texts stand in the store for each prompt; `texts` maps prompt ids to others."""
    form = make_form()
    teacher_form = teacher_form or form
    teacher_model = make_model(len(teacher_form.tokenizer), seed=1).requires_grad_(False).eval()
    _set_generation(teacher_model, teacher_form.tokenizer)
    teacher = Teacher(teacher_model, teacher_form.tokenizer, teacher_form, "t")
    student = make_model(len(form.tokenizer), layers=2, seed=2)
    store = CompletionStore(tmp_path / "c.sqlite")
    config = methods.load("cot").config(
        output_dir=str(tmp_path / "checkpoints"), **{**TINY, **training}
    )
    arguments = Arguments(
        RunArguments(method="cot", resume=resume),
        StudentArguments(student_model="s"),
        TeacherArguments("t", teacher_max_new_tokens=10, teacher_completions="stored"),
        DataArguments(train_file="t", validation_file="v"),
        config,
    )
    heldout = HeldoutCheck.prepare(form, teacher, prompts[:2], store, 10, None)
    setting = Setting(arguments, student, form, teacher, store, prompts, heldout, Totals())
    texts = {p.id: crafted(n) for n, p in enumerate(prompts)} | (texts or {})
    store_completions(
        store,
        "t",
        teacher_form,
        config.rationale_sampling(setting.sampling),
        {config.rationale_format().ask(prompt.question): texts[prompt.id] for prompt in prompts},
    )
    teacher.generated_tokens = 0
    return setting


def build(setting):
    return methods.load("cot").build(setting)


def trained(tmp_path, **kwargs):
    setting = make_setting(tmp_path, **kwargs)
    trainer = build(setting)
    before = copy.deepcopy(setting.student.state_dict())
    trainer.train()
    return setting, trainer, before


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(setting):
    return torch.cat([p.detach().flatten() for p in setting.student.parameters()])
