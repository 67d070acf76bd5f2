"""The benchmarks by generated answers: the second protocol, made for students that reason before they answer.

Each model is asked in its own prompt format, as the run asked it, and answers greedily. The teacher of a
chain-of-thought run gets the run's instruction; its student only if it was trained with it. Other models are told to
give only the answer. What is given is then looked for in the text. In doubt nothing is found: such an answer counts as wrong, and how many there
are is a rate of its own.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lm_eval.utils import hash_string

from eval.answers import draw_answers, writing_batches
from eval.batching import BatchSize
from eval.benchmarks import describe
from eval.fitting import check_room, fit
from eval.item_store import ItemStore
from eval.options import Options
from eval.questions import Benchmark, load_benchmarks, log_skipped
from eval.statistics import macro_f1, wilson
from eval.subjects import Pair, Subject
from medistill_trl.answer_matching import LABELS, matches
from medistill_trl.rationales import RationaleFormat
from medistill_trl.teacher import Completion, Sampling

FILES = ["benchmarks/*.jsonl", "benchmarks/few_shot/*.jsonl"]
PLAIN_TOKENS = 32
LETTERS = "ABCDEFGHIJ"
QUESTIONS = {  # the rest is asked as it stands
    "pubmedqa": "Abstract: {context}\n\nQuestion: {question}",
    "pubhealth": "Claim: {question}\n\nIs the claim true, false, a mixture of both, or unproven?",
    "pubhealth_2class": "Claim: {question}\n\nIs the claim true or false?",
}
ONLY = "Give only the answer."
# Where a text says what its answer is; the piece goes to the end of the sentence.
STATED = re.compile(
    r"\b(?:answer|option|choice)\b[^.:\n]{0,20}?(?:\bis\b|:)[\s*_]*([^\n]+?)(?=[.!?](?:\s|$)|\n|$)",
    re.I,
)
CHOSEN = re.compile(
    r"\bI(?:['’]d| would| will)? (?:choose|pick|select|go with)\s+([^\n]+?)(?=[.!?](?:\s|$)|\n|$)",
    re.I,
)
BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]+)\}")
# What may follow an answer in its sentence: its reason, or that it is right.
AFTER = re.compile(r",?\s+(?:because|since|as|due to|is (?:the )?(?:correct|right|best))\b.*", re.S)
# The next question, which a model invents once it has answered this one.
NEXT = re.compile(r"\n\s*[*_#]*(?:question|claim|abstract)\b[*_\s\d]*:.*", re.I | re.S)
# "No evidence was found" does not say no.
DETERMINER = re.compile(
    r"^\W*no(?=\s+(?!(?:it|they|this|that|these|those|there|the|he|she|we|not)\b)[a-z])", re.I
)


def check(pair: Pair, data: Path, options: Options) -> None:
    """Raises UserError for what would stop `evaluate`."""
    load_benchmarks(data, replace(_as_asked(options), limit=1))
    protocol = Protocol.of(pair.recipe, options)
    check_room(pair.subjects, protocol.max_new_tokens, "generative_tokens")


def _as_asked(options: Options) -> Options:
    """Examples and other orders of the options are for likelihoods, so they keep nothing from being asked here."""
    return replace(options, few_shot=0, option_shuffles=0)


def evaluate(pair: Pair, data: Path, options: Options, store: ItemStore) -> dict:
    """Every benchmark that is there, for both models; see `docs/evaluation.md` for the result's keys."""
    benchmarks, skipped = load_benchmarks(data, _as_asked(options))
    protocol = Protocol.of(pair.recipe, options)
    result: dict = {
        "protocol": "reasoning, then the answer" if protocol.reasoning else "the answer alone",
        "answer_tokens": protocol.max_new_tokens,
    }
    result |= {name: describe(benchmark) for name, benchmark in benchmarks.items()}
    items = []
    for subject in pair.subjects:
        batches = writing_batches(options)
        for name, benchmark in benchmarks.items():
            found = answer(subject, benchmark, protocol, batches, store)
            result[name][subject.name] = score(benchmark, found)
            items += found
    if skipped:
        log_skipped(skipped)
        result["skipped"] = skipped
    return result | {"items": items}


@dataclass(frozen=True)
class Protocol:
    """How answers are asked for and found.

    Args:
        reasoning: The form of a rationale with its answer; None to ask for the answer alone.
        max_new_tokens: Longest answer.
        instructed: Names of the subjects that are told how to reason; the others learnt it on plain questions.
    """

    reasoning: RationaleFormat | None
    max_new_tokens: int
    instructed: tuple[str, ...] = ("teacher",)

    @classmethod
    def of(cls, recipe: dict | None, options: Options) -> "Protocol":
        """That of the run: a recipe that says how rationales are written is a chain-of-thought run's."""
        recipe = recipe or {}
        reasoning, tokens, instructed = None, PLAIN_TOKENS, ("teacher",)
        if "rationale_separator" in recipe:
            tokens = recipe["rationale_max_new_tokens"]
            reasoning = RationaleFormat(
                recipe["rationale_separator"],
                recipe["end_marker"],
                recipe["rationale_instruction"],
            )
            if recipe["student_sees_instruction"]:
                instructed = ("student", "teacher")
        return cls(reasoning, options.generative_tokens or tokens, instructed)

    def ask(self, subject: str, benchmark: str, row: dict, passages: Sequence[str]) -> str:
        """The question as a user would put it to the student or the teacher."""
        template = QUESTIONS.get(benchmark, "{question}")
        question = template.format(question=row["question"], context="".join(passages))
        if is_lettered(row["options"]):
            listed = zip(LETTERS, row["options"], strict=False)
            question += "\n\n" + "\n".join(f"{letter}. {text}" for letter, text in listed)
            question += "\n\nChoose the right option; its letter is the answer."
        else:
            question += f"\n\nChoose one: {', '.join(row['options'])}."
        if self.reasoning is None:
            return f"{question} {ONLY}"
        return self.reasoning.ask(question) if subject in self.instructed else question

    def find(self, text: str, options: Sequence[str]) -> int | None:
        """The option a text gives as its answer; None if there is none or more than one."""
        if self.reasoning is None:
            return stated_option(text, options)
        parsed = self.reasoning.parse(text)
        if parsed.answer is None or parsed.answers_differ:
            return None
        return named_option(parsed.answer, options)


# --- finding the answer ----------------------------------------------------------------------------


def is_lettered(options: Sequence[str]) -> bool:
    """Whether options are told apart by letters, or are labels themselves: yes, no, maybe; true, false."""
    return not any(set(options) <= set(family) for family in LABELS.values())


def named_option(answer: str, options: Sequence[str]) -> int | None:
    """The option that a short answer names, by its letter, label or text.

    Returns:
        Its index; None if it names none, or more than one.
    """
    references = options
    if is_lettered(options):
        listed = list(zip(LETTERS, options, strict=False))
        references = [f"({letter}) {text}" for letter, text in listed]
        if sum(_stands_in(answer, letter, text) for letter, text in listed) > 1:
            return None
    else:
        labels = "|".join(map(re.escape, options))
        answer = re.sub(rf"\b({labels})\s*[/,]\s*(?=(?:{labels})\b)", r"\1 or ", answer, flags=re.I)
        answer = DETERMINER.sub("", answer)
    found = [n for n, reference in enumerate(references) if matches(answer, reference)]
    return found[0] if len(found) == 1 else None


def _stands_in(answer: str, letter: str, text: str) -> bool:
    """Whether an option is written out, its letter before it."""
    return re.search(rf"(?<!\w){letter}[.):]\s*{re.escape(text)}", answer) is not None


def stated_option(text: str, options: Sequence[str]) -> int | None:
    """The option a free text gives: where it says "the answer is", else in its first or its last line.

    A text whose lines name several options, as a list of them does, chooses none.
    """
    text = NEXT.sub("", text.strip())
    pieces = [piece for stated in (STATED, CHOSEN, BOXED) for piece in stated.findall(text)]
    stated = {named_option(_bare(piece), options) for piece in pieces} - {None}
    if stated:
        return stated.pop() if len(stated) == 1 else None
    echo = ", ".join(options)  # of the question, which chooses nothing
    lines = [line for line in text.splitlines() if line.strip() and echo not in line]
    named = [named_option(_bare(line), options) for line in lines]
    at_the_ends = {*named[:1], *named[-1:]} - {None}
    several = len({*named} - {None}) > 1
    return None if several or not at_the_ends else at_the_ends.pop()


def _bare(piece: str) -> str:
    """An answer without what follows it in the same sentence."""
    return AFTER.sub("", piece)


# --- one model -------------------------------------------------------------------------------------


def answer(
    subject: Subject,
    benchmark: Benchmark,
    protocol: Protocol,
    batches: BatchSize,
    store: ItemStore,
) -> list[dict]:
    """One record an item: what was written, which option that is (`choice`, None if none) and whether it is right."""
    rows = [question.doc for question in benchmark.questions]
    prompts = [
        fit(
            subject,
            lambda kept, row=row: protocol.ask(subject.name, benchmark.name, row, kept),
            [row["context"]],
            protocol.max_new_tokens,
        )
        for row in rows
    ]
    drawn = draw_answers(
        subject,
        [prompt.prompt for prompt in prompts],
        Sampling(protocol.max_new_tokens),
        batches,
        store,
        f"{subject.name}: written answers, {benchmark.name}",
    )
    return [
        record(benchmark.name, subject.name, row, completion, protocol)
        | {"shortened": p.shortened, "too_long": p.too_long}
        for row, completion, p in zip(rows, drawn, prompts, strict=True)
    ]


def record(
    benchmark: str, subject: str, row: dict, completion: Completion, protocol: Protocol
) -> dict:
    choice = protocol.find(completion.text, row["options"])
    return {
        "benchmark": benchmark,
        "subject": subject,
        "id": row["id"],
        "doc_hash": hash_string(repr(sorted(row.items()))),
        "answer": row["answer"],
        "choice": choice,
        "right": choice == row["answer"],
        "text": completion.text,
        "finished": completion.finished,
    }


def score(benchmark: Benchmark, records: Sequence[dict]) -> dict:
    """Accuracy and what goes with it, of one model; what could not be read is wrong."""
    read = [record for record in records if record["choice"] is not None]
    right = sum(record["right"] for record in records)
    counts = Counter(record["choice"] for record in records)
    predictions = {label: counts[option] for option, label in enumerate(benchmark.labels)}
    return {
        "accuracy": wilson(right, len(records)).to_dict(),
        "unparsed": wilson(len(records) - len(read), len(records)).to_dict(),
        "accuracy_of_parsed": wilson(right, len(read)).to_dict(),
        "macro_f1": macro_f1(
            [record["choice"] for record in records], [record["answer"] for record in records]
        ),
        "cut_at_limit": sum(not record["finished"] for record in records),
        "context_shortened": sum(record["shortened"] for record in records),
        "too_long": sum(record["too_long"] for record in records),
        "predictions": {**predictions, "unparsed": counts[None]},
    }
