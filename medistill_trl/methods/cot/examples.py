"""From prompts to training examples: rationales drawn, judged, scored, selected, accounted for, encoded."""

import json
import logging
from collections.abc import Callable
from itertools import takewhile

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from medistill_trl.completion_store import DEFAULT_BATCH_SIZE
from medistill_trl.data import Prompt
from medistill_trl.errors import UserError
from medistill_trl.files import write_text
from medistill_trl.prompts import IGNORED, PromptFormat, encode_example
from medistill_trl.rationale_selection import (
    drop_duplicates,
    select,
    summary,
    to_jsonl,
    to_text,
    vote,
)
from medistill_trl.rationales import Rationale, RationaleFormat, judge
from medistill_trl.setting import Setting
from medistill_trl.teacher import Completion, context_length, mean_log_likelihoods

logger = logging.getLogger(__name__)

RECORD, SUMMARY = "rationales.jsonl", "rationales_summary.json"
SCORE_DIGITS = 4  # what lies below is rounding of the batch a rationale was scored in


def training_examples(setting: Setting) -> list[dict[str, list[int]]]:
    """The examples of a run, in the order of its prompts.

    Every drawn rationale and its fate is written to results/rationales.jsonl, the counts to
    results/rationales_summary.json.

    Raises:
        UserError: separator or end marker cannot be written by the models; the prompts do not fit the
            teacher; nothing is left to train on.
    """
    args = setting.arguments.training
    form = args.rationale_format()
    _check_texts(setting, form)
    groups = _judged(setting, form)
    _score(setting, form, groups)
    kept = [select(group, args.selection()) for group in groups]
    account = summary(groups, args.on_no_rationale)
    if PartialState().is_main_process:
        write_text(setting.run_directory.results / RECORD, to_jsonl(groups))
        setting.run_directory.write_result(SUMMARY, account)
    logger.info("%s", to_text(account))
    fallbacks = _fallbacks(setting, kept)
    examples = [
        example
        for prompt, rationales in zip(setting.train_prompts, kept, strict=True)
        for example in (
            [rationale_example(setting, form, prompt, rationale) for rationale in rationales]
            or [plain_example(setting, prompt, c) for c in fallbacks.get(prompt.id, [])]
        )
    ]
    if not examples:
        raise UserError(
            f"no rationale is left to train on:\n{to_text(account)}\n"
            f"{setting.run_directory.results / RECORD} shows each; change rationale_instruction or the limits, draw "
            "more (num_rationales), or set on_no_rationale: fallback"
        )
    if not any(kept):
        logger.warning(
            "warning: no rationale was kept, so the student learns plain completions, as with method: sft; see %s",
            setting.run_directory.results / RECORD,
        )
    return examples


# --- drawing and judging ---------------------------------------------------------------------------


def _check_texts(setting: Setting, form: RationaleFormat) -> None:
    """Refuse markers that generation would cut or decoding drop, and prompts too long for the teacher."""
    teacher = setting.teacher
    for name, text in (("rationale_separator", form.separator), ("end_marker", form.end_marker)):
        for stop in teacher.form.stop_strings:
            if text and stop in f"\n{text}":
                raise UserError(
                    f"{name} {text!r}: the teacher's completions end at {stop!r}, so it would never be written; "
                    "choose another text"
                )
        for tokenizer in (setting.form.tokenizer, teacher.tokenizer):
            special = next((t for t in tokenizer.all_special_tokens if t in text), None)
            if special is not None:
                raise UserError(
                    f"{name} {text!r} holds the special token {special!r}, which decoding drops; choose plain text"
                )
    limit = teacher.context_length
    longest = max(
        len(teacher.form.encode(teacher.form.render(form.ask(prompt.question))))
        for prompt in setting.train_prompts
    )
    new = setting.arguments.training.rationale_max_new_tokens
    if limit is not None and longest + new > limit:
        raise UserError(
            f"rationale_max_new_tokens: {new} with a prompt of {longest} tokens (the instruction counts) is more "
            f"than the {limit} tokens the teacher attends to; lower it, or max_prompt_tokens"
        )


def _judged(setting: Setting, form: RationaleFormat) -> list[list[Rationale]]:
    """The rationales of every prompt, after the filters that need no teacher."""
    args = setting.arguments.training
    questions = [form.ask(prompt.question) for prompt in setting.train_prompts]
    sampling = args.rationale_sampling(setting.sampling)
    drawn = setting.draw(questions, sampling, args.num_rationales, "rationales")
    pairs = tqdm(
        zip(setting.train_prompts, drawn, strict=True),
        total=len(drawn),
        desc="judging rationales",
        unit="prompt",
        disable=not PartialState().is_main_process,
    )
    limits, count_tokens = args.limits(), _token_counter(setting.form)
    groups = []
    for prompt, completions in pairs:
        room = _room(setting, form, prompt)
        group = [
            judge(prompt, sample, completion, form, limits, count_tokens, room)
            for sample, completion in enumerate(completions)
        ]
        vote(group)
        drop_duplicates(group)
        groups.append(group)
    return groups


def _token_counter(form: PromptFormat) -> Callable[[str], int]:
    return lambda text: len(form.tokenizer(text, add_special_tokens=False)["input_ids"])


def _room(setting: Setting, form: RationaleFormat, prompt: Prompt) -> int | None:
    """Student tokens left after the prompt; None if nothing limits them."""
    limits = [setting.arguments.training.max_length, context_length(setting.student.config)]
    limits = [limit for limit in limits if limit is not None]
    asked = setting.form.render(_student_question(setting, form, prompt))
    return min(limits) - len(setting.form.encode(asked)) if limits else None


# --- scores ----------------------------------------------------------------------------------------


def _score(setting: Setting, form: RationaleFormat, groups: list[list[Rationale]]) -> None:
    """Give every rationale still open the teacher's mean log-likelihood, under the prompt it was drawn with.

    Each process scores its share and all get all scores, so that all select alike. A resumed run takes
    them from its record.
    """
    known = _known_scores(setting)
    open_ = [
        (prompt, rationale)
        for prompt, group in zip(setting.train_prompts, groups, strict=True)
        for rationale in group
        if rationale.fate is None
    ]
    missing = [
        encode_example(
            setting.teacher.form,
            form.ask(prompt.question),
            "".join(form.render(rationale.rationale, rationale.answer)),
            False,  # how texts end differs between models; it is no part of the reasoning
            None,
        )
        for prompt, rationale in open_
        if (rationale.id, rationale.sample) not in known
    ]
    names = [(r.id, r.sample) for _, r in open_ if (r.id, r.sample) not in known]
    known |= dict(zip(names, _likelihoods(setting, missing), strict=True))
    for _, rationale in open_:
        rationale.score = known[rationale.id, rationale.sample]


def _known_scores(setting: Setting) -> dict[tuple[str, int], float]:
    """Scores in the record of the run that is resumed, by prompt and sample."""
    path = setting.run_directory.results / RECORD
    if not (setting.arguments.run.resume and path.exists()):
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {(row["id"], row["sample"]): row["score"] for row in rows if row["score"] is not None}


def _likelihoods(setting: Setting, examples: list[dict]) -> list[float]:
    """The teacher's scores of all examples, shared out among the processes."""
    state, teacher = PartialState(), setting.teacher
    # Longest first, as completions are drawn; a batch of like lengths has little padding.
    order = sorted(range(len(examples)), key=lambda n: -len(examples[n]["input_ids"]))
    share = order[state.process_index :: state.num_processes]
    if share:
        teacher.check_log_probs()
    size = setting.arguments.teacher.teacher_batch_size or DEFAULT_BATCH_SIZE
    scores: list[tuple[int, float]] = []
    bar = tqdm(
        total=len(share), desc="scoring rationales", disable=not (share and state.is_main_process)
    )
    with bar:
        for start in range(0, len(share), size):
            part = share[start : start + size]
            log_probs = teacher.completion_log_probs([examples[n] for n in part])
            found = mean_log_likelihoods(log_probs)
            scores += [
                (n, round(score, SCORE_DIGITS)) for n, score in zip(part, found, strict=True)
            ]
            bar.update(len(part))
    return [score for _, score in sorted(gather_object(scores))]


# --- encoding --------------------------------------------------------------------------------------


def _student_question(setting: Setting, form: RationaleFormat, prompt: Prompt) -> str:
    seen = setting.arguments.training.student_sees_instruction
    return form.ask(prompt.question) if seen else prompt.question


def rationale_example(
    setting: Setting, form: RationaleFormat, prompt: Prompt, rationale: Rationale
) -> dict[str, list[int]]:
    """A kept rationale as the student learns it, see `encode_example`.

    Returns:
        Also `rationale_mask`, as long as `labels`: 1 on the rationale's tokens. A token that holds the end
        of the rationale and the beginning of the separator counts as the separator's.
    """
    question = _student_question(setting, form, prompt)
    parts = form.render(rationale.rationale, rationale.answer)
    example = encode_example(setting.form, question, "".join(parts), True, None)
    alone = encode_example(setting.form, question, parts[0], False, None)["input_ids"]
    both = zip(example["input_ids"], alone, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
    mask = [
        int(place < common and label != IGNORED) for place, label in enumerate(example["labels"])
    ]
    return example | {"rationale_mask": mask}


def plain_example(setting: Setting, prompt: Prompt, completion: Completion) -> dict[str, list[int]]:
    """A plain completion: all of it is answer."""
    example = encode_example(
        setting.form,
        prompt.question,
        completion.text,
        completion.finished,
        setting.arguments.training.max_length,
    )
    return example | {"rationale_mask": [0] * len(example["labels"])}


def _fallbacks(setting: Setting, kept: list[list[Rationale]]) -> dict[str, list[Completion]]:
    """The teacher's plain completion of each prompt that keeps no rationale, by its id."""
    if setting.arguments.training.on_no_rationale == "drop":
        return {}
    without = [
        p for p, rationales in zip(setting.train_prompts, kept, strict=True) if not rationales
    ]
    questions = [prompt.question for prompt in without]
    drawn = setting.draw(questions, setting.sampling, 1, "teacher completions")
    return {prompt.id: completions for prompt, completions in zip(without, drawn, strict=True)}
