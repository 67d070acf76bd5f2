"""Speed and memory of both models: what a smaller student buys.

Greedy generation of a batch of answers that all have the same length, prompt included in the time: each
model after its own prompt, with its key-value cache, as answers are drawn everywhere here. The prompt is the question
of median length in every row, so that nothing is padded and no odd question decides. Both models are timed with the
same batch size, since a larger batch is written at more tokens per second.
"""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from eval.answers import writing_batches
from eval.batching import BatchSize
from eval.cost import Cost
from eval.footprint import footprint
from eval.item_store import ItemStore
from eval.options import Options
from eval.prefixes import FILE, read_questions
from eval.subjects import Pair, Subject

FILES = [FILE]
NEW_TOKENS = 32  # of each answer
REPETITIONS = 2


def check(pair: Pair, data: Path, options: Options) -> None:
    """Raises UserError for what would stop `evaluate`: no question that fits both models."""
    read_questions(pair, data, options)


def evaluate(pair: Pair, data: Path, options: Options, store: ItemStore) -> dict:
    """See `docs/evaluation.md` for the result's keys."""
    questions = [prompt.question for prompt in read_questions(pair, data, options).prompts]
    question = sorted(questions, key=len)[len(questions) // 2]
    result: dict = {"new_tokens": NEW_TOKENS, "repetitions": REPETITIONS}
    batches = writing_batches(options)
    for subject in pair.subjects:
        result[subject.name] = measure(subject, question, batches, store)
    for subject in pair.subjects:  # again, if the other one turned out to hold less
        if result[subject.name]["batch_size"] != batches.size:
            result[subject.name] = measure(subject, question, batches, store)
    if pair.teacher is not None:
        student, teacher = result["student"], result["teacher"]
        result["student_to_teacher"] = {
            name: student[name] / teacher[name]
            for name in ("parameters", "weights_gb", "tokens_per_second")
        }
    return result


def measure(subject: Subject, question: str, batches: BatchSize, store: ItemStore) -> dict:
    """One model, alone at work; what it generates is thrown away.

    Args:
        batches: The same for all models that are compared: it keeps the size that fits all of them.

    Returns:
        `parameters`; `weights_gb`; `batch_size`; `prompt_tokens`;
        `tokens_per_second`, new tokens of the whole batch over the faster of the repetitions, since other
        programs only ever slow one; `generation_gb`, the most that generating added to what was held
        before it; and `peak_memory_gb`, weights and that.
    """
    known = footprint(subject, store)

    def timed(size: int) -> tuple[int, int, float, float]:
        batch = encode(subject, [question] * size)
        # The first time allocates what the others use again, so it is not timed.
        added = memory_added(lambda: generate(subject, batch, NEW_TOKENS))
        seconds = [generate(subject, batch, NEW_TOKENS) for _ in range(REPETITIONS)]
        return size, batch["input_ids"].shape[1], min(seconds), added

    size, prompt_tokens, seconds, added = batches.attempt(timed)
    return {
        **known,
        "batch_size": size,
        "prompt_tokens": prompt_tokens,
        "tokens_per_second": size * NEW_TOKENS / seconds,
        "generation_gb": added,
        "peak_memory_gb": known["weights_gb"] + added,
    }


def encode(subject: Subject, questions: list[str]) -> dict[str, torch.Tensor]:
    """The prompts, padded on the left."""
    prompts = [subject.form.encode(subject.form.render(question)) for question in questions]
    padded = subject.form.tokenizer.pad(
        {"input_ids": prompts}, padding_side="left", return_tensors="pt"
    )
    return padded.to(subject.model.device)


def generate(subject: Subject, batch: dict[str, torch.Tensor], new_tokens: int) -> float:
    """Seconds that greedy answers of exactly this length take."""
    synchronise()
    start = time.perf_counter()
    subject.model.generate(
        **batch,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
    )
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Wait for what was sent to the accelerator; a CPU is done when a call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_added(work: Callable[[], object]) -> float:
    """GB (10⁹ bytes) that some work holds at most beyond what was held before it."""
    on_device = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_device else psutil.Process().memory_info().rss
    with Cost() as cost:
        work()
    peak = torch.cuda.max_memory_allocated() if on_device else cost.peak_host_memory_gb * 1e9
    return max(0.0, (peak - before) / 1e9)
