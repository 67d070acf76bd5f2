"""A training step of each method, as its trainer takes it, beside the bare models and beside TRL's loss.

The trainer runs its own loop on the embedded pair. After each optimizer step the bare step runs on the tokens it
has worked on, then our loss and TRL's, each forward and backward: so all of them take turns, and what slows the
machine down slows all. Times are of the processor, which others on the machine affect less than the clock's. The
first repetition warms up; the last is for memory, with an allocator that gives freed blocks back.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import TrainerCallback

from benchmarks.performance.bare_steps import BARE, Recorder, Taken
from benchmarks.performance.trl_losses import TRL
from benchmarks.training_step import mark_peak, peak_during, peak_since_mark, say
from medistill_trl import methods, pipeline, recipe
from medistill_trl.inputs import load_models
from medistill_trl.prompts import IGNORED
from medistill_trl.run_directory import RunDirectory
from medistill_trl.setting import Setting

OVERLAY = "recipes/overlays/embedded.yaml"
M_MMAP_THRESHOLD = -3  # of mallopt(3)
# The recipes as they are, but for steps that are short enough, and nothing written while they are timed.
WORDS = {
    "max_train_samples": 16,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
STORED = {"teacher_completions": "stored"}  # generation is measured by itself
OF_METHOD = {
    **{name: STORED for name in ("sft", "logit_kd", "adakd", "fitnets", "attention")},
    "cot": {"num_rationales": 1, "rationale_max_new_tokens": 64},
    "bond": {"gradient_accumulation_steps": 1},  # one prompt, its four samples
}


@dataclass
class Measured:
    """Of one method; seconds are of the processor, bytes above what was resident before.

    Args:
        tokens: Of the micro-batches of the last repetition, padding included.
        completion_tokens: Of these, those that are learnt.
        seconds: `step`, `bare`, and where TRL has such a loss `loss` and `trl` → of each repetition.
        peak_bytes: The same names.
    """

    method: str
    tokens: int = 0
    completion_tokens: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


def embedded_setting(method: str, work: Path, **changes) -> Setting:
    """What the method's trainer is built from, loaded as a run of the recipe would.

    Args:
        work: For the completions, which all methods share, and what the trainer may write.
        changes: To the recipe.
    """
    values = {
        **WORDS,
        **OF_METHOD.get(method, {}),
        "output_dir": work / "runs" / method,
        "completion_store": work / "completions.sqlite",
        **changes,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    checked = recipe.load([f"recipes/{method}.yaml", OVERLAY, *words])
    loaded_method = methods.load(method)
    arguments = pipeline.build_arguments(
        checked, loaded_method, RunDirectory(checked.output_dir), use_cpu=True
    )
    return load_models(arguments, pipeline.check_inputs(loaded_method, arguments))


def measure(setting: Setting, repetitions: int, memory: bool = True) -> Measured:
    """Train until there is enough to say what a step takes.

    Args:
        repetitions: That are counted; one more warms up.
        memory: Measure it too, in one more.
    """
    method = setting.arguments.run.method
    trainer = pipeline.build_trainer(methods.load(method), setting)
    recorder = Recorder(setting, trainer, BARE[method].samples)
    meter = Meter(recorder, method, repetitions, memory)
    trainer.add_callback(meter)
    trainer.train()
    return meter.measured


class Meter(TrainerCallback):
    """Times each step of a trainer, and after it what it is compared with; ends training when it has enough.

    A repetition is as many optimizer steps as share a rollout, one without rollouts.
    """

    def __init__(self, recorder: Recorder, method: str, repetitions: int, memory: bool):
        self.recorder = recorder
        self.measured = Measured(method)
        self.wanted = repetitions
        self.memory = memory
        self.period = getattr(recorder.trainer.args, "steps_per_rollout", 1)
        self.rivals: dict[str, Callable[[Taken], None]] = {"bare": BARE[method].run}
        if method in TRL:
            self.rivals |= {"loss": _own_loss, "trl": _loss_of(TRL[method])}
        self._taken: list[Taken] = []
        self._spent, self._warm, self._base = 0.0, False, None

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self._spent += time.process_time() - self._start
        self._taken.append(self.recorder.take())
        if len(self._taken) == self.period:
            if self._base is not None:
                self._compare_memory()
                control.should_training_stop = True
            else:
                control.should_training_stop = self._compare_time()
            self._taken, self._spent = [], 0.0
        self._start = time.process_time()
        return control

    def _compare_time(self) -> bool:
        """One repetition of the others; returns whether that is all."""
        seconds = {"step": self._spent}
        for name, rival in self.rivals.items():
            start = time.process_time()
            self._run(rival)
            seconds[name] = time.process_time() - start
        told = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        say(f"  {self.measured.method}: {told} s")
        if self._warm:
            for name, value in seconds.items():
                self.measured.seconds.setdefault(name, []).append(value)
        self._warm = True
        if len(self.measured.seconds.get("step", [])) < self.wanted:
            return False
        self._count_tokens()
        if self.memory:
            _give_back_freed_blocks()
            self._base = mark_peak()
        return not self.memory

    def _compare_memory(self) -> None:
        peaks = {"step": peak_since_mark() - self._base}
        for name, rival in self.rivals.items():
            _give_back_freed_blocks()
            before, most = peak_during(lambda rival=rival: self._run(rival))
            peaks[name] = most - before
        self.measured.peak_bytes = peaks

    def _run(self, rival: Callable[[Taken], None]) -> None:
        for taken in self._taken:
            rival(taken)
            taken.setting.student.zero_grad(set_to_none=True)

    def _count_tokens(self) -> None:
        batches = [batch for taken in self._taken for batch in taken.batches]
        learnt = "completion_mask" if "completion_mask" in batches[0] else "labels"
        outside = 0 if learnt == "completion_mask" else IGNORED
        self.measured.tokens = sum(batch["input_ids"].numel() for batch in batches)
        self.measured.completion_tokens = sum(
            int((batch[learnt] != outside).sum()) for batch in batches
        )


def _own_loss(taken: Taken) -> None:
    for batch in taken.batches:
        loss = taken.trainer.compute_loss(
            taken.setting.student, dict(batch), num_items_in_batch=taken.num_items
        )
        loss.backward()


def _loss_of(function: Callable) -> Callable[[Taken], None]:
    def run(taken: Taken) -> None:
        for batch in taken.batches:
            function(taken, batch).backward()

    return run


def _give_back_freed_blocks() -> None:
    """Also from now on, those of 64 KB or more: the mark would otherwise tell of the allocator's habits."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    give_back_free_pages()


def give_back_free_pages() -> None:
    """To the system: what is taken again would not be seen in the resident size."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def of_method(method: str, work: Path, repetitions: int) -> dict:
    """Measure a method on the embedded pair."""
    say(f"== {method}")
    torch.manual_seed(0)
    return asdict(measure(embedded_setting(method, work), repetitions))
