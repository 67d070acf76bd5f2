"""The memory plan beside what real training steps take, on the embedded pair and a CPU:

python -m benchmarks.memory_plan [--only 0 3 5] [--small]

Every setting below is a process of its own. It builds the method's trainer on real weights, trains two optimizer steps
on examples of exactly the planned length, and reads the largest resident size of that time, less what the process
took before any weights were loaded (Python and libraries). The plan is made from the configs alone. Completions are
cut from the packaged sample: nobody has to write them. With --small the pair is a fifth as wide, of random weights:
minutes instead of a quarter of an hour.

Markdown on stdout, progress on stderr. Exits with 1 if a plan is further off than it may be.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.step_pair import EMBEDDED
from benchmarks.training_step import ROOT, machine, peak_during, resident, say
from medistill_trl import methods, model_source, models, recipe
from medistill_trl.checkpoints import Totals
from medistill_trl.data import Prompt
from medistill_trl.heldout import HeldoutCheck
from medistill_trl.inputs import Loaded
from medistill_trl.memory.plan import Planner
from medistill_trl.memory.step import Lengths
from medistill_trl.pipeline import build_arguments, check_inputs
from medistill_trl.prompts import PromptFormat
from medistill_trl.run_directory import RunDirectory
from medistill_trl.setting import Arguments, Setting
from medistill_trl.teacher import Completion, Teacher

TOLERANCE = 0.15
STEPS = 2  # in the second one the optimizer has its state


@dataclass(frozen=True)
class Case:
    """A setting that is planned and measured.

    Args:
        tokens: Of every example; half of it is the completion.
        extra: Further words of the command.
    """

    method: str
    rows: int
    tokens: int
    lora: bool
    checkpointing: bool
    extra: str = ""

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.tokens - self.tokens // 2, self.tokens // 2)

    def words(self, folder: str, small: bool) -> list[str]:
        keys = _small_pair(folder) if small else {}
        keys |= {
            "output_dir": folder,
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": 1,
            "use_lora": str(self.lora).lower(),
            "gradient_checkpointing": str(self.checkpointing).lower(),
            "teacher_completions": "stored",
            "max_length": self.tokens,
            "max_prompt_tokens": self.tokens - self.tokens // 2,
            "teacher_max_new_tokens": self.tokens // 2,
            "max_steps": STEPS,
            "num_train_epochs": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "heldout_prompts": 1,
            "on_bad_row": "skip",
        }
        flags = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
        files = [f"recipes/{self.method}.yaml", "recipes/overlays/embedded.yaml"]
        return [*files, *flags, *self.extra.split()]


CASES = (
    Case("logit_kd", 4, 256, True, False),
    Case("logit_kd", 4, 256, True, True),
    Case("logit_kd", 2, 512, False, False),
    Case("logit_kd", 4, 256, False, True),
    Case("sft", 4, 320, True, False),
    Case("sft", 2, 256, False, False),
    Case("sft", 4, 256, True, False, "--student_dtype bfloat16 --bf16 true"),
    Case("fitnets", 4, 192, True, False),
    Case("attention", 2, 384, True, True),
    Case("spin", 2, 192, True, False, "--num_iterations 1 --max_new_tokens 1"),
)


# --- one case, in a process of its own


class CutCompletions:
    """Instead of a store: completions of a certain length that nobody has to write."""

    def __init__(self, completion: Completion):
        self.completion = completion

    def draw(self, teacher, prompts, sampling, samples, batch_size, label):
        return [[self.completion] * samples for _ in prompts]


def _small_pair(folder: str) -> dict[str, object]:
    """Random weights with the embedded pair's tokenizer and vocabulary; the recipe's keys for them."""
    source = model_source.resolve(recipe.load(EMBEDDED).values["teacher_model"])
    tokenizer = models.load_tokenizer(source)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
    keys = {"student_keep_layers": "null"}
    for role, layers in (("teacher", 10), ("student", 8)):
        config = LlamaConfig(vocab_size=source.num_embeddings, num_hidden_layers=layers, **sizes)
        keys[f"{role}_model"] = f"{folder}-{role}"
        LlamaForCausalLM(config).save_pretrained(keys[f"{role}_model"])
        tokenizer.save_pretrained(keys[f"{role}_model"])
    return keys


def plan_and_measure(case: Case, small: bool) -> dict:
    """`planned` bytes by part, `measured` bytes, and the seconds of both."""
    with tempfile.TemporaryDirectory() as folder:
        given = recipe.load(case.words(f"{folder}/run", small))
        method = methods.load(given.values["method"])
        arguments = build_arguments(given, method, RunDirectory(given.output_dir), True)
        arguments.training.disable_tqdm = True
        loaded = check_inputs(method, arguments)
        configs = loaded.student.config, loaded.teacher.config
        start = time.perf_counter()
        planner = Planner(arguments, *configs, method.memory, "cpu", case.lengths)
        phase = planner.train(case.rows, case.checkpointing)
        seconds_planning = time.perf_counter() - start
        del planner
        torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # loads its library
        gc.collect()
        before = resident("VmRSS")
        setting = _setting(arguments, loaded, case.lengths)
        trainer = method.build(setting)
        gc.collect()
        start = time.perf_counter()
        _, peak = peak_during(trainer.train)
        return {
            "planned": {part: round(gb * 1e9) for part, gb in phase.parts.items()},
            "measured": peak - before,
            "seconds": time.perf_counter() - start,
            "seconds_planning": seconds_planning,
        }


def _setting(arguments: Arguments, loaded: Loaded, lengths: Lengths) -> Setting:
    """As `load_models` makes it, on examples of a certain length."""
    s, t, form = arguments.student, arguments.teacher, loaded.student_form
    cpu = torch.device("cpu")
    judge = models.load_teacher(loaded.teacher, loaded.teacher_form.tokenizer, t, s, cpu)
    student = models.load_student(loaded.student, form.tokenizer, s, cpu)
    teacher = Teacher(judge, loaded.teacher_form.tokenizer, loaded.teacher_form, "benchmark")
    ids = form.tokenizer.encode(" ".join(p.reference for p in loaded.train_prompts))
    completion = Completion(
        form.tokenizer.decode(ids[: lengths.completion]), ids[: lengths.completion], False
    )
    rows = arguments.training.per_device_train_batch_size
    # Every other prompt is a token shorter, so that there is padding, as in nearly every batch.
    prompts = [
        Prompt(f"p{n}", "cut", _question(form, ids, lengths.prompt - n % 2), "r", None)
        for n in range(STEPS * rows)
    ]
    heldout = HeldoutCheck(form, teacher, prompts[:1], [completion])
    store = CutCompletions(completion)
    return Setting(arguments, student, form, teacher, store, prompts, heldout, Totals())


def _question(form: PromptFormat, ids: list[int], tokens: int) -> str:
    """A text whose rendered prompt has so many tokens."""
    for length in range(tokens, 0, -1):
        text = form.tokenizer.decode(ids[:length])
        if len(form.encode(form.render(text))) == tokens:
            return text
    raise ValueError(f"no prompt of {tokens} tokens can be cut from the sample")


# --- all of them


def in_a_process(number: int, small: bool) -> dict:
    words = [sys.executable, "-m", "benchmarks.memory_plan", "--case", str(number)]
    words += ["--small"] if small else []
    # As in `training_step.peak`: what is freed goes back to the system.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def table(found: dict[int, dict]) -> str:
    lines = [
        "| method | rows × tokens | trains | checkpointing | weights GB | planned GB | measured GB | off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, result in found.items():
        case, planned = CASES[number], sum(result["planned"].values())
        weights = sum(v for k, v in result["planned"].items() if k.endswith("weights"))
        cells = (
            case.method,
            f"{case.rows} × {case.tokens}",
            ("LoRA" if case.lora else "all weights") + (", bf16" if "bf16" in case.extra else ""),
            "yes" if case.checkpointing else "no",
            f"{weights / 1e9:.2f}",
            f"{planned / 1e9:.2f}",
            f"{result['measured'] / 1e9:.2f}",
            f"{off(result):+.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def off(result: dict) -> float:
    """Of the plan from what was measured."""
    return sum(result["planned"].values()) / result["measured"] - 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", default=range(len(CASES)), metavar="N")
    parser.add_argument("--small", action="store_true", help="a pair of random weights")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        print(json.dumps(plan_and_measure(CASES[given.case], given.small)))
        return 0
    found = {}
    for number in given.only:
        found[number] = in_a_process(number, given.small)
        say(f"{CASES[number]}: {off(found[number]):+.1%} {found[number]}")
    print(f"# The memory plan beside real steps\n\n{machine()}\n\n{table(found)}\n")
    worst = max(abs(off(result)) for result in found.values())
    print(f"Furthest off: {worst:.1%}; may be {TOLERANCE:.0%}.")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
