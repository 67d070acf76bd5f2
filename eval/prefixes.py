"""The texts on which two models' distributions are compared: three answers to each held-out question.

- `gold`: the data's reference answer;
- `teacher`: what the teacher answers;
- `student`: what the student answers. Only these prefixes show what its own mistakes lead it to.

All are answers to the same questions, each after the model's own prompt.
"""

from dataclasses import dataclass
from pathlib import Path

from eval.answers import draw_answers, writing_batches
from eval.item_store import ItemStore
from eval.options import Options
from eval.subjects import Pair
from medistill_trl.data import Prompt, read_prompts
from medistill_trl.prompts import encode_completion
from medistill_trl.teacher import Completion, Sampling

FILE = "processed/test.jsonl"
SETS = ("gold", "teacher", "student")
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Questions:
    """Held-out questions.

    Args:
        prompts: Those that both models can read and answer.
        left_out: Rows that were not usable, with the reason: broken, or too long for one of the models.
    """

    prompts: list[Prompt]
    left_out: list[str]


def read_questions(pair: Pair, data: Path, options: Options) -> Questions:
    """The first questions of the test split that fit both models with every answer of theirs.

    Raises:
        UserError: no question is left.
    """
    longest = new_tokens(pair, options)

    def too_long(prompt: Prompt) -> str | None:
        for subject in pair.subjects:
            if subject.context_length is None:
                continue
            rendered = subject.form.render(prompt.question)
            answer = encode_completion(subject.form.tokenizer, rendered, prompt.reference, True)
            needed = len(subject.form.encode(rendered)) + max(len(answer), longest)
            if needed > subject.context_length:
                return f"needs {needed} tokens, and the {subject.name} attends to {subject.context_length}"
        return None

    limit = min(options.fidelity_questions, options.limit or options.fidelity_questions)
    prompts, report = read_prompts(str(data / FILE), "skip", limit, too_long)
    return Questions(prompts, report.skipped)


def new_tokens(pair: Pair, options: Options) -> int:
    """The longest answer: as asked for, or as the run's teacher wrote for training."""
    trained_on = (pair.recipe or {}).get("teacher_max_new_tokens", DEFAULT_NEW_TOKENS)
    return options.max_new_tokens or trained_on


def gold_answers(pair: Pair, prompts: list[Prompt]) -> list[Completion]:
    """The references, in the student's tokens; they end where the text ends."""
    form = pair.student.form
    return [
        Completion(
            prompt.reference,
            encode_completion(
                form.tokenizer, form.render(prompt.question), prompt.reference, finished=False
            ),
            finished=True,
            end_id=form.tokenizer.eos_token_id,
        )
        for prompt in prompts
    ]


def answers(
    pair: Pair,
    writer: str,
    prompts: list[Prompt],
    sampling: Sampling,
    options: Options,
    store: ItemStore,
) -> list[Completion]:
    """What one of the models answers to each question.

    Args:
        writer: `student` or `teacher`.
    """
    subject = pair.student if writer == "student" else pair.teacher
    rendered = [subject.form.render(prompt.question) for prompt in prompts]
    label = f"answers of the {subject.name}"
    return draw_answers(subject, rendered, sampling, writing_batches(options), store, label)


def prefix_set(
    name: str,
    pair: Pair,
    prompts: list[Prompt],
    sampling: Sampling,
    options: Options,
    store: ItemStore,
) -> list[Completion]:
    """One of `SETS`."""
    if name == "gold":
        return gold_answers(pair, prompts)
    return answers(pair, name, prompts, sampling, options, store)
