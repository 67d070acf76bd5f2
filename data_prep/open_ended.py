"""Dataset records → long-form questions.

A long-form question stands alone: no option letters, and options only where the question has no clear
answer without them, as a plain list. What cannot be converted is refused with a reason, not mangled.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_prep.choices import Choices, Unconvertible, resolve_choices
from data_prep.explanations import clean_conclusion, clean_explanation
from data_prep.letters import find_letter_leak
from data_prep.pictures import needs_picture
from data_prep.schema import Record
from data_prep.stems import Stem, parse_stem

__all__ = ["LongForm", "Unconvertible", "convert"]

TEMPLATES = yaml.safe_load(Path(__file__).with_name("templates.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class LongForm:
    """A question that stands alone.

    Args:
        question: The question with its template around it.
        reference: The answer as a sentence, then the explanation where the dataset has one.
        answer: The gold answer alone.
    """

    question: str
    reference: str
    answer: str


def convert(record: Record) -> LongForm:
    """The long-form question of a record; the same record always gives the same one.

    Raises:
        Unconvertible: The record cannot stand without its options' letters, or lacks a picture.
    """
    if record.source in {"medqa", "medmcqa"}:
        return _multiple_choice(record)
    if record.source == "pubmedqa":
        return _yes_no_maybe(record)
    if record.source == "pubhealth":
        return _claim(record)
    raise ValueError(
        f"source is {record.source!r}; it must be medqa, medmcqa, pubmedqa or pubhealth."
    )


def _multiple_choice(record: Record) -> LongForm:
    if needs_picture(record.question, record.explanation):
        raise Unconvertible("needs a picture")
    choices = resolve_choices(record.question, record.options, record.answer)
    stem = parse_stem(choices.question)
    form = _form(stem, choices)
    if form == "several" and stem.form == "exception":
        raise Unconvertible("statement codes ask for exceptions")
    question = _template(record, form).format(
        case=stem.case,
        stem=_closed(stem, form),
        options="\n".join(f"- {text}" for text in choices.listed),
    )
    explanation = clean_explanation(record.explanation, choices.answer, record.options)
    return _checked(question, _sentence(choices.answer), explanation, choices.answer)


def _closed(stem: Stem, form: str) -> str:
    """The asking sentence as its list of statements needs it: a question or a heading."""
    if form != "several":
        return stem.text
    text = stem.text.replace("Which of these is ", "Which of these are ")
    return text if stem.form == "question" else f"{text}:"


def _form(stem: Stem, choices: Choices) -> str:
    if choices.several:
        return "several"
    if stem.form == "exception":
        return "exception"
    return f"listed_{stem.form}" if stem.needs_options or choices.meta else stem.form


def _yes_no_maybe(record: Record) -> LongForm:
    answer = record.options[record.answer]
    question = record.question.strip()
    form = "question" if question.endswith("?") else "statement"
    question = _template(record, form).format(
        stem=question if form == "question" else question.rstrip(" .")
    )
    return _checked(question, _sentence(answer), clean_conclusion(record.explanation), answer)


def _claim(record: Record) -> LongForm:
    answer = record.options[record.answer]
    claim = _sentence(record.question.strip())
    question = _template(record, "claim").format(stem=claim)
    verdict = TEMPLATES["pubhealth"]["labels"][answer]
    return _checked(question, verdict, clean_conclusion(record.explanation), answer)


def _checked(question: str, sentence: str, explanation: str, answer: str) -> LongForm:
    """The parts put together after the last gate: a leaking explanation is dropped, the rest refused."""
    if find_letter_leak(question) or find_letter_leak(answer):
        raise Unconvertible("option letters cannot be removed")
    reference = f"{sentence} {explanation}".strip()
    if explanation and find_letter_leak(reference):
        reference = sentence
    return LongForm(question, reference, answer)


def _template(record: Record, form: str) -> str:
    templates = TEMPLATES[record.source][form]
    digest = hashlib.sha256(record.id.encode()).digest()
    return templates[int.from_bytes(digest[:4], "big") % len(templates)]


def _sentence(text: str) -> str:
    """The text with a capital and a full stop; a first word with capitals inside stays as it is."""
    first = re.match(r"[a-z]+\b(?!-?[A-Z0-9])", text)
    text = text[:1].upper() + text[1:] if first else text
    return text if re.search(r"[.!?]['\"”’)]*\Z", text) else text + "."
