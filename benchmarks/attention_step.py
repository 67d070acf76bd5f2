"""Time and memory of one attention-transfer step beside the straightforward version:

python -m benchmarks.attention_step [--batch 2] [--tokens 512] [--repetitions 5] [--modes lora full] [--bf16] [--tiny]

A step is forward and backward, without optimizer, on the embedded pair and a CPU, in float32, or with the
products in bfloat16 as on a GPU. The variants:

    plain   both models on eager attention, with the maps of all layers from `output_attentions`; then
            (1−α) CE on whole logits + α Σ ‖A_S − A_T‖² over the mapped pairs
    ours    `AttentionTrainer.compute_loss`, all layers on sdpa
    trunks  both trunks on sdpa, no head and no loss: what no method does without

Times are of the processor, which others on the machine affect less than the clock's. Memory is how far the peak resident size of a process of its own lies above what it held before the step: the
loaded models. Markdown on stdout, progress on stderr.
"""

import argparse
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

from benchmarks.kd_step import MODES, ROOT, machine, ratio_with_spread, say
from benchmarks.kd_variants import embedded_pair, random_rows, tiny_pair
from medistill_trl import console
from medistill_trl.checkpoints import Totals
from medistill_trl.layers import base_model
from medistill_trl.methods.attention import AttentionConfig, AttentionTrainer, pairs_of
from medistill_trl.pair_writer import PairWriter
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.teacher import Sampling, Teacher

ALPHA = 0.5
# Ratio → the most it may be.
LIMITS = {"memory": 0.4, "time": 0.7}


@dataclass
class Bench:
    """What a variant works on."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    batch: dict[str, torch.Tensor]
    trainer: AttentionTrainer
    bf16: bool


def prepare(mode: str, given: argparse.Namespace, folder: str) -> Bench:
    """Models, batch and trainer of one mode.

    Args:
        folder: Where the trainer may write; it does not.
    """
    pair = tiny_pair if given.tiny else embedded_pair
    student, teacher, tokenizer = pair(lora=mode == "lora")
    student.config.use_cache = teacher.config.use_cache = False
    args = AttentionConfig(
        output_dir=folder,
        alpha=ALPHA,
        num_layer_pairs=1 if given.tiny else 2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    form = PromptFormat(tokenizer)
    judge = Teacher(teacher, tokenizer, form, "benchmark")
    trainer = AttentionTrainer(
        model=student,
        args=args,
        train_dataset=Dataset.from_list([{"question": "", "example": None}]),
        writer=PairWriter(form, judge, len(tokenizer), Sampling(1), Totals(), None),
        pairs=pairs_of(args, student.config, teacher.config),
        relation_heads=None,
    )
    rows = random_rows(len(tokenizer), given.batch, given.tokens)
    return Bench(student.train(), teacher, trainer.data_collator(rows), trainer, given.bf16)


# --- the variants


def plain(bench: Bench) -> torch.Tensor:
    inputs = {name: bench.batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher = bench.teacher(**inputs, output_attentions=True).attentions
    student = bench.student(**inputs, output_attentions=True)
    labels = bench.batch["labels"][:, 1:].flatten()
    ce = F.cross_entropy(student.logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED)
    rows = bench.batch["compared"].bool()
    maps = [(student.attentions[s - 1], teacher[t - 1]) for s, t in bench.trainer.pairs]
    apart = sum((own - its).square().sum((1, 3))[rows].sum() for own, its in maps)
    return (1 - ALPHA) * ce + ALPHA * apart / rows.sum()


def ours(bench: Bench) -> torch.Tensor:
    return bench.trainer.compute_loss(bench.student, bench.batch)


def trunks(bench: Bench) -> torch.Tensor:
    inputs = {name: bench.batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        bench.teacher.get_decoder()(**inputs, use_cache=False)
    decoder = base_model(bench.student).get_decoder()
    return decoder(**inputs, use_cache=False).last_hidden_state.float().mean()


VARIANTS: dict[str, Callable[[Bench], torch.Tensor]] = {
    "plain": plain,
    "ours": ours,
    "trunks": trunks,
}


def step(name: str, bench: Bench) -> tuple[float, float]:
    """Processor seconds of a forward and backward, and the loss."""
    for model in (bench.student, bench.teacher):
        base_model(model).set_attn_implementation("eager" if name == "plain" else "sdpa")
    bench.student.zero_grad(set_to_none=True)
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bench.bf16):
        loss = VARIANTS[name](bench)
    loss.backward()
    return time.process_time() - start, loss.item()


# --- measures


def step_times(bench: Bench, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition but the first, which warms up. The variants take turns, in another order
    each time.

    Raises:
        RuntimeError: the two losses differ.
    """
    names = list(VARIANTS)
    seconds = {name: [] for name in names}
    for repetition in range(repetitions):
        losses = {}
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            taken, losses[name] = step(name, bench)
            seconds[name].append(taken)
            say(f"  repetition {repetition}: {name} {taken:.2f} s, loss {losses[name]:.6f}")
        tolerance = 1e-2 if bench.bf16 else 1e-4
        if abs(losses["plain"] - losses["ours"]) > tolerance * abs(losses["plain"]):
            raise RuntimeError(f"the variants compute different losses: {losses}")
    return {name: times[1:] for name, times in seconds.items()}


def resident(kind: str) -> int:
    """Bytes: VmRSS, of now, or VmHWM, the largest since the mark was set."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", status).group(1))


def own_peak(variant: str, given: argparse.Namespace) -> int:
    """Bytes: how far one step of the variant takes this process above what it held before."""
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(given.modes[0], given, folder)
    # All weights must be in memory before: the plain step would otherwise read those of the heads.
    for model in (bench.student, bench.teacher):
        for parameter in model.parameters():
            parameter.sum()
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark to the present size
    before = resident("VmRSS")
    step(variant, bench)
    return resident("VmHWM") - before


def peak(variant: str, mode: str, given: argparse.Namespace) -> int:
    """`own_peak` of a fresh process, since what one variant leaves in the allocator would serve the next."""
    words = [sys.executable, "-m", "benchmarks.attention_step", "--peak_of", variant]
    words += ["--modes", mode, "--batch", str(given.batch), "--tokens", str(given.tokens)]
    words += [f"--{name}" for name in ("tiny", "bf16") if vars(given)[name]]
    # Blocks from 64 KB on go back to the system when freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    size = json.loads(child.stdout.splitlines()[-1])
    say(f"  {mode}, {variant}: {size / 1e9:.3f} GB above the loaded models")
    return size


def section(mode: str, given: argparse.Namespace) -> str:
    """One mode's table and checks."""
    say(f"== {MODES[mode]}")
    memory = {name: peak(name, mode, given) for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(mode, given, folder)
        seconds = step_times(bench, given.repetitions)
    trainer = bench.trainer
    pairs = [
        f"{t} → {s}" for s, t in zip(trainer.student_layers, trainer.teacher_layers, strict=True)
    ]
    precision = "bfloat16 products" if given.bf16 else "float32"
    lines = [
        f"## {MODES[mode]}, {precision}: {given.batch} × {given.tokens} tokens, layers {', '.join(pairs)}",
        "",
        "| | median processor s | / plain | GB above the models | / plain |",
        "|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        ratio = ratio_with_spread(times, seconds["plain"])
        share = memory[name] / memory["plain"]
        lines.append(
            f"| {name} | {median(times):.2f} | {ratio} | {memory[name] / 1e9:.3f} | {share:.3f} |"
        )
    found = {
        "memory": memory["ours"] / memory["plain"],
        "time": median(seconds["ours"]) / median(seconds["plain"]),
    }
    lines += [""] + [
        f"- {name} {found[name]:.3f}, required ≤ {limit}: "
        f"{'holds' if found[name] <= limit else 'does not hold'}"
        for name, limit in LIMITS.items()
    ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--tokens", type=int, default=512, help="of a row, prompt included")
    parser.add_argument("--repetitions", type=int, default=5, help="the first is discarded")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=["lora", "full"])
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--tiny", action="store_true", help="random models, to try the script")
    parser.add_argument("--peak_of", choices=VARIANTS, help=argparse.SUPPRESS)
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
        print(own_peak(given.peak_of, given))
        return
    sections = [section(mode, given) for mode in given.modes]
    print("\n\n".join(["# One attention-transfer step", machine(), *sections]))


if __name__ == "__main__":
    main()
