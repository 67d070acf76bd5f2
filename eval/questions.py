"""The benchmarks' questions, as lm-eval's tasks (`eval/tasks/*.yaml`) put them."""

import logging
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from eval.data_files import ADVICE, benchmark_files
from eval.options import BENCHMARKS, Options
from medistill_trl.errors import UserError

logger = logging.getLogger(__name__)

TASKS = Path(__file__).parent / "tasks"
# Options, in lower case and with single blanks.
SPEAKS_OF_OTHERS = re.compile(
    r"\b(?:all|none|any|both|neither|either|some) (?:of )?(?:the )?(?:above|these|following|options|other)\b"
    r"|^(?:all|none|any|both|neither|either)(?: of (?:them|these|those))?[.!]?$"
)
SPEAKS_OF_UPPER = re.compile(r"above|^(?:both|neither|either)\b")
_NAME = r"\(?(?:[a-e]|[1-5]|i{1,3}|iv)\)?"
NAMES_OTHERS = re.compile(
    rf"^(?:(?:both|only|all|options?) )*{_NAME}(?:\s*(?:,|&|\+|and|or)\s*(?:options? )?{_NAME})+"
    r"(?: only| both| are (?:correct|true|right))?[.!]?$"
    r"|^both (?:options? )?[a-e]{2}$"
)


@dataclass(frozen=True)
class Question:
    """One item as it is asked.

    Args:
        doc: The row of the benchmark.
        prompt: With the few-shot examples.
        choices: Continuations, one for each place.
        order: The option that stands at each place; only other than 0, 1, … when shuffled.
    """

    doc: dict
    prompt: str
    choices: list[str]
    order: tuple[int, ...]

    @property
    def item(self) -> dict:
        """What the store keeps the answer under: nothing else decides it."""
        return {"id": self.doc["id"], "prompt": self.prompt, "choices": self.choices}


class Benchmark:
    """One task with its questions, in the order of the file.

    Args:
        name: Of the file below `benchmarks/`.
        task: lm-eval's task.
        options: `limit`, `few_shot`, `option_shuffles` and `seed` decide what is asked.

    Attributes:
        questions: One a row.
        reordered: Places of those that are asked in other orders too.
        partly_fixed: How many of these keep some option where it stands.
        shuffled: For each other order the questions of `reordered`.
    """

    def __init__(self, name: str, task: ConfigurableTask, options: Options):
        self.name = name
        self.task = task
        self.few_shot = options.few_shot
        rows = list(task.eval_docs)
        if options.few_shot:
            refuse_leaks(name, list(task.fewshot_docs())[: options.few_shot], rows)
        docs = rows[: options.limit]
        self.questions = [self.ask(doc, tuple(range(len(doc["options"])))) for doc in docs]
        # Labels such as yes and no are not a list that could be given in another order.
        count = options.option_shuffles if self.has_letters else 0
        orders = [other_orders(doc, count, options.seed) for doc in docs]
        self.reordered = [number for number, found in enumerate(orders) if found]
        self.partly_fixed = sum(
            len(movable(docs[n])) < len(docs[n]["options"]) for n in self.reordered
        )
        self.shuffled = [
            [self.ask(docs[number], orders[number][turn]) for number in self.reordered]
            for turn in range(count)
        ]

    @property
    def has_letters(self) -> bool:
        return isinstance(self.task.config.doc_to_choice, list)

    @property
    def has_subjects(self) -> bool:
        return bool(self.task.config.metadata.get("subjects"))

    @property
    def labels(self) -> list[str]:
        """What the options are called: letters, or the options themselves."""
        return list(self.task.doc_to_choice(self.questions[0].doc))

    @property
    def answers(self) -> list[int]:
        return [question.doc["answer"] for question in self.questions]

    def ask(self, doc: dict, order: tuple[int, ...]) -> Question:
        """The question with its options in this order, as lm-eval's task puts it."""
        shown = doc | {
            "options": [doc["options"][option] for option in order],
            "answer": order.index(doc["answer"]),
        }
        prompt = self.task.fewshot_context(shown, num_fewshot=self.few_shot)
        requests = self.task.construct_requests(
            doc=shown, ctx=prompt, metadata=(self.task.task_name, None, 1)
        )
        return Question(doc, prompt, [request.args[1] for request in requests], order)


def movable(doc: dict) -> list[int]:
    """Places of the options that mean the same wherever they stand.

    Not those that speak of others: all of the above, both; nor what stands below an `above` or a `both`. None where an
    option names others by letter or number (both A and B). Options with the same text stay too: either is the answer.
    """
    texts = [" ".join(text.casefold().split()) for text in doc["options"]]
    if any(NAMES_OTHERS.search(text) for text in texts):
        return []
    fixed = {n for n, text in enumerate(texts) if SPEAKS_OF_OTHERS.search(text)}
    fixed |= {n for n, text in enumerate(texts) if texts.count(text) > 1}
    end = min((n for n in fixed if SPEAKS_OF_UPPER.search(texts[n])), default=None)
    return [n for n in range(len(texts))[:end] if n not in fixed]


def other_orders(doc: dict, count: int, seed: int) -> list[tuple[int, ...]]:
    """`count` orders of a row's options, all different and none as in the row; drawn for each row anew.

    Returns:
        None at all where the options that can move have fewer orders.

    Raises:
        UserError: not even if all of them could move.
    """
    size, places = len(doc["options"]), movable(doc)
    if count >= math.factorial(size):
        raise UserError(
            f"--option_shuffles: {count}, but {size} options have only {math.factorial(size) - 1} other orders"
        )
    if count >= math.factorial(len(places)):
        return []
    draw = random.Random(f"{seed} {doc['id']}")
    found = [tuple(range(size))]
    while len(found) <= count:
        moved = dict(zip(places, draw.sample(places, len(places)), strict=True))
        order = tuple(moved.get(place, place) for place in range(size))
        if order not in found:
            found.append(order)
    return found[1:]


def refuse_leaks(name: str, examples: Sequence[dict], rows: Sequence[dict]) -> None:
    """Refuse few-shot examples that are also asked.

    Raises:
        UserError: naming them.
    """
    ids = {row["id"] for row in rows}
    questions = {_normalised(row["question"]) for row in rows}
    leaked = [
        example["id"]
        for example in examples
        if example["id"] in ids or _normalised(example["question"]) in questions
    ]
    if leaked:
        raise UserError(
            f"few-shot examples of {name}: {', '.join(leaked)} also stand in the benchmark, so their answers "
            f"would be shown; {ADVICE}"
        )


def _normalised(question: str) -> str:
    return " ".join(question.casefold().split())


def load_benchmarks(data: Path, options: Options) -> tuple[dict[str, Benchmark], dict[str, str]]:
    """The benchmarks whose files are there, and why others are not."""
    manager = TaskManager(
        include_path=TASKS, include_defaults=False, metadata={"data": str(data.resolve())}
    )
    found, missing = {}, {}
    for name in options.benchmarks or BENCHMARKS:
        absent = [path for path in benchmark_files(data, name) if not path.is_file()]
        if absent:
            missing[name] = f"no file {absent[0]}; {ADVICE}"
            continue
        task = manager.load(f"medistill_{name}")["tasks"][f"medistill_{name}"]
        available = len(task.fewshot_docs())
        if options.few_shot > available:
            missing[name] = f"only {available} few-shot examples; choose a smaller --few_shot"
            continue
        found[name] = Benchmark(name, task, options)
    return found, missing


def log_skipped(missing: dict[str, str]) -> None:
    for name, why in missing.items():
        logger.warning("benchmark %s is skipped: %s", name, why)
