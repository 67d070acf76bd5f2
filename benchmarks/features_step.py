"""Time and memory of one FitNets training step, beside the straightforward version:

python -m benchmarks.features_step [--batch 4] [--tokens 256] [--repetitions 5] [--tiny]

A step is forward and backward, without optimizer, on the embedded pair and a CPU, in float32; with all weights
training and with LoRA r=16; α 0.5, the recipe's two layer pairs and projections. The variants:

    plain   both models run whole with `output_hidden_states=True`; CE on whole logits; mse on the mapped layers
    trunks  the same without the teacher's logits, and CE from the hidden states, a chunk of tokens at a time
    ours    `FitNetsTrainer.compute_loss`

Markdown on stdout, progress on stderr.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel

from benchmarks.kd_step import MODES, ROOT, machine, say
from benchmarks.kd_variants import embedded_pair, random_rows, tiny_pair
from medistill_trl import console
from medistill_trl.checkpoints import Totals
from medistill_trl.layers import base_model, layer_pairs
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.token_kl import completion_states, distillation_loss
from medistill_trl.methods.fitnets import FitNetsConfig
from medistill_trl.methods.fitnets.trainer import FitNetsTrainer
from medistill_trl.pair_writer import PairWriter
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.teacher import Sampling, Teacher

ALPHA = 0.5
LIMIT = 0.8  # of plain's memory above the loaded models


@dataclass
class Bench:
    """What a variant works on.

    Args:
        batch: As the trainer collates it.
        trainer: Ours; its projections and pairs serve all variants.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    batch: dict[str, torch.Tensor]
    trainer: FitNetsTrainer

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: self.batch[name] for name in ("input_ids", "attention_mask")}


def prepare(mode: str, batch: int, tokens: int, tiny: bool, folder: str) -> Bench:
    """Models, batch and trainer of one mode.

    Args:
        folder: Where the trainer may write; it does not.
    """
    student, teacher, tokenizer = (tiny_pair if tiny else embedded_pair)(lora=mode == "lora")
    student.config.use_cache = teacher.config.use_cache = False
    form = PromptFormat(tokenizer)
    writer = PairWriter(
        form=form,
        teacher=Teacher(teacher, tokenizer, form, "benchmark"),
        shared=len(tokenizer),
        sampling=Sampling(1),
        totals=Totals(),
        max_length=None,
    )
    depths = [base_model(m).config.num_hidden_layers for m in (student, teacher)]
    trainer = FitNetsTrainer(
        model=student,
        args=FitNetsConfig(
            output_dir=folder,
            alpha=ALPHA,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"question": "", "example": None}]),
        writer=writer,
        pairs=layer_pairs("uniform", min(2, *depths), *depths),
    )
    rows = random_rows(len(tokenizer), batch, tokens)
    return Bench(student.train(), teacher, trainer.data_collator(rows), trainer)


# --- the variants: each a forward and a backward


def features(
    bench: Bench, student_states: tuple[torch.Tensor, ...], teacher_states: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The mean squared error of the mapped layers, summed over pairs."""
    labels_BT = bench.batch["labels"]
    loss = 0.0
    for projection, (layer, teacher_layer) in zip(
        bench.trainer.projections, bench.trainer.pairs, strict=True
    ):
        student_NG, _ = completion_states(student_states[layer], labels_BT)
        teacher_NH, _ = completion_states(teacher_states[teacher_layer], labels_BT)
        loss = loss + F.mse_loss(projection(student_NG), teacher_NH)
    return loss


def plain(bench: Bench) -> None:
    with torch.no_grad():
        teacher = bench.teacher(**bench.inputs, output_hidden_states=True)
    student = bench.student(**bench.inputs, output_hidden_states=True)
    logits_NV, targets_N = completion_states(student.logits, bench.batch["labels"])
    loss = ALPHA * features(bench, student.hidden_states, teacher.hidden_states)
    (loss + (1 - ALPHA) * F.cross_entropy(logits_NV, targets_N)).backward()


def trunks(bench: Bench) -> None:
    base = base_model(bench.student)
    with torch.no_grad():
        teacher = bench.teacher.get_decoder()(**bench.inputs, output_hidden_states=True)
    student = base.get_decoder()(**bench.inputs, output_hidden_states=True)
    states_NH, targets_N = completion_states(student.last_hidden_state, bench.batch["labels"])
    ce, _ = distillation_loss(states_NH, targets_N, OutputHead.of(base), alpha=0.0)
    loss = ALPHA * features(bench, student.hidden_states, teacher.hidden_states)
    (loss + (1 - ALPHA) * ce / len(targets_N)).backward()


def ours(bench: Bench) -> None:
    num_items = (bench.batch["labels"] != IGNORED).sum()
    bench.trainer.compute_loss(bench.student, bench.batch, num_items_in_batch=num_items).backward()


VARIANTS: dict[str, Callable[[Bench], None]] = {"plain": plain, "trunks": trunks, "ours": ours}


def timed(variant: Callable[[Bench], None], bench: Bench) -> float:
    """Seconds of one step."""
    bench.student.zero_grad(set_to_none=True)
    start = time.perf_counter()
    variant(bench)
    return time.perf_counter() - start


def step_times(bench: Bench, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition but the first; the variants take turns, each time in another order."""
    names = list(VARIANTS)
    seconds = {name: [] for name in names}
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(VARIANTS[name], bench))
            say(f"  repetition {repetition}: {name} {seconds[name][-1]:.2f} s")
    return {name: times[1:] for name, times in seconds.items()}


# --- memory


def resident(mark: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at its highest since the mark was cleared."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{mark}:\s+(\d+) kB", status).group(1))


def own_peak(variant: str, mode: str, batch: int, tokens: int, tiny: bool) -> int:
    """Bytes that one step of the variant takes above the loaded models, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(mode, batch, tokens, tiny, folder)
    ids = torch.arange(4)[None]
    with torch.no_grad():  # every weight is read from disk once, so none of it counts as the step's
        for model in (bench.student, bench.teacher):
            model(input_ids=ids)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    timed(VARIANTS[variant], bench)
    return resident("VmHWM") - before


def peak(variant: str, mode: str, batch: int, tokens: int, tiny: bool) -> int:
    """`own_peak` in a fresh process: what one variant leaves in the allocator would serve the next."""
    words = [sys.executable, "-m", "benchmarks.features_step", "--peak_of", variant, "--mode", mode]
    words += ["--batch", str(batch), "--tokens", str(tokens), *(["--tiny"] if tiny else [])]
    # Blocks from 64 KB on go back to the system when freed, so that the mark is not the allocator's habit.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    size = json.loads(child.stdout.splitlines()[-1])
    say(f"  {mode}, {batch} × {tokens} tokens, {variant}: {size / 1e9:.3f} GB above the models")
    return size


# --- the report


def paired_ratio(numerators: list[float], denominators: list[float]) -> str:
    """Median and range of the ratios within repetitions, whose speeds differ on a shared machine."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def compare(given: argparse.Namespace, mode: str) -> str:
    """One mode's section."""
    say(f"== {MODES[mode]}")
    setting = (mode, given.batch, given.tokens, given.tiny)
    memory = {name: peak(name, *setting) for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(*setting, folder)
        seconds = step_times(bench, given.repetitions)
    compared = int((bench.batch["labels"] != IGNORED).sum())
    pairs = ", ".join(f"{s} ← {t}" for s, t in bench.trainer.pairs)
    lines = [
        f"## {MODES[mode]}: {given.batch} × {given.tokens} tokens, {compared} of completions, layers {pairs}",
        "",
        "| | median s | / plain | GB above the models | / plain |",
        "|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        cells = [f"{median(times):.2f}", paired_ratio(times, seconds["plain"])]
        cells += [f"{memory[name] / 1e9:.3f}", f"{memory[name] / memory['plain']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    found = memory["ours"] / memory["plain"]
    holds = "holds" if found <= LIMIT else "does not hold"
    return "\n".join([*lines, "", f"- memory ours/plain {found:.3f}, required ≤ {LIMIT}: {holds}"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--tokens", type=int, default=256, help="of a row, prompt included")
    parser.add_argument("--repetitions", type=int, default=5, help="the first is discarded")
    parser.add_argument("--tiny", action="store_true", help="random models, to try the script")
    parser.add_argument("--peak_of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.repetitions < 2:
        parser.error(
            f"--repetitions must be at least 2, the first is discarded; got {given.repetitions}"
        )
    return given


def main() -> None:
    given = parse()
    console.set_up(main_process=True)
    console.quiet_loading_bars()
    os.chdir(ROOT)
    if given.peak_of is not None:
        print(own_peak(given.peak_of, given.mode, given.batch, given.tokens, given.tiny))
        return
    sections = [compare(given, mode) for mode in MODES]
    print("\n\n".join(["# One FitNets step", machine(), *sections]))


if __name__ == "__main__":
    main()
