"""Crafted teacher outputs where a run looks for them: in its completion store."""

from types import SimpleNamespace

import tiny_setting
from tiny_setting import train

from medistill_trl import methods
from medistill_trl.completion_store import CompletionStore, _request
from medistill_trl.data import Prompt
from medistill_trl.prompts import PromptFormat
from medistill_trl.teacher import Completion, Sampling


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
        store._put(teacher, sampling, zip(requests, completions, strict=True), seconds=1.0)


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
TINY = {"rationale_max_new_tokens": 24, "num_rationales": 3}


def crafted(number, *others):
    """A good rationale, a wrong one, one without separator; in another order each time."""
    texts = [
        f"{REASON} This is case {number}.\n\nFinal answer: Radial nerve",
        f"{REASON}\n\nFinal answer: ulnar nerve",
        "It is the radial nerve.",
        *others,
    ]
    return texts[number % len(texts) :] + texts[: number % len(texts)]


def make_setting(folder, texts=None, prompts=PROMPTS, resume=False, **changes):
    """Crafted texts stand in the store for each prompt; `texts` maps prompt ids to others."""
    setting = tiny_setting.make_setting(
        folder,
        "cot",
        prompts=prompts,
        run={"resume": resume},
        teacher={"teacher_completions": "stored"},
        **TINY | changes,
    )
    config, teacher = setting.arguments.training, setting.teacher
    texts = {p.id: crafted(n) for n, p in enumerate(prompts)} | (texts or {})
    store_completions(
        setting.store,
        teacher.identity,
        teacher.form,
        config.rationale_sampling(setting.sampling),
        {config.rationale_format().ask(prompt.question): texts[prompt.id] for prompt in prompts},
    )
    teacher.generated_tokens = 0
    return setting


def build(setting):
    return methods.load("cot").build(setting)


def trained(folder, **changes):
    return train(make_setting(folder, **changes))
