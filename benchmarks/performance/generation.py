"""What the teacher's completions cost: through the completion store, beside plain `generate`."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.performance.steps import embedded_setting
from benchmarks.training_step import say
from medistill_trl.completion_store import CompletionStore
from medistill_trl.prompts import PromptFormat
from medistill_trl.setting import Setting
from medistill_trl.teacher import Sampling

NEW_TOKENS = 32
BATCH_SIZE = 16


def measure(work: Path, repetitions: int) -> dict:
    """Of the embedded teacher, greedy, on 16 prompts of the packaged sample."""
    say("== generation")
    return compare(embedded_setting("sft", work), repetitions)


def compare(setting: Setting, repetitions: int) -> dict:
    """Seconds of the processor by variant, and how many tokens were written.

    Returns:
        `prompts`, `tokens` and `seconds`: variant → of each repetition.
    """
    prompts = [setting.teacher.form.render(prompt.question) for prompt in setting.train_prompts]
    sampling = Sampling(NEW_TOKENS)
    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        stores = iter(CompletionStore(Path(folder) / f"{n}.sqlite") for n in range(repetitions + 1))
        store = None

        def draw(again: bool) -> None:
            nonlocal store, drawn
            store = store if again else next(stores)
            drawn = store.draw(setting.teacher, prompts, sampling, 1, BATCH_SIZE, "completions")

        model, form = setting.teacher.model, setting.teacher.form
        variants = {
            "store, first time": lambda: draw(again=False),
            "store, second time": lambda: draw(again=True),
            "generate, same batch": lambda: generate(model, form, prompts, BATCH_SIZE),
            "generate, one at a time": lambda: generate(model, form, prompts, 1),
        }
        # In this order: what is read the second time was drawn just before.
        seconds = {name: [] for name in variants}
        for _ in range(repetitions + 1):
            for name, variant in variants.items():
                seconds[name].append(_timed(variant))
                say(f"  {name}: {seconds[name][-1]:.2f} s")
    tokens = sum(completion.num_tokens for group in drawn for completion in group)
    counted = {name: values[1:] for name, values in seconds.items()}
    return {"prompts": len(prompts), "tokens": tokens, "seconds": counted}


def _timed(variant: Callable[[], None]) -> float:
    start = time.process_time()
    variant()
    return time.process_time() - start


@torch.no_grad()
def generate(
    model: PreTrainedModel, form: PromptFormat, prompts: list[str], batch_size: int
) -> None:
    """As one writes it down: encode, pad on the left, `generate`, decode, in the order the prompts come in."""
    for first in range(0, len(prompts), batch_size):
        ids = [form.encode(prompt) for prompt in prompts[first : first + batch_size]]
        batch = form.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        written = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)
        form.tokenizer.batch_decode(
            written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
