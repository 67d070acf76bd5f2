"""Phases, parts and the largest micro-batch.

Everything is counted on models of few layers, of two depths, and continued to the whole depth on a line, each part at
each moment by itself: every layer adds the same. Alike for the micro-batch.

Not seen: what kernels and libraries take for themselves while they run (cuBLAS workspaces, flash attention's
buffers), the allocator's fragments, the CUDA context, copies while weights are loaded, DDP's buckets, and on a CPU
Python and its libraries. `usable` allows for these.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from medistill_trl.completion_store import DEFAULT_BATCH_SIZE
from medistill_trl.losses.chunked import blocks_as_on
from medistill_trl.memory import weightless
from medistill_trl.memory.losses import CrossEntropy, window
from medistill_trl.memory.meter import Meter
from medistill_trl.memory.step import (
    CACHE,
    GRADIENTS,
    LOSS,
    STUDENT,
    TEACHER,
    UPDATE,
    Lengths,
    Step,
)
from medistill_trl.setting import Arguments

GB = 1e9
CONTEXT_GB, FRAGMENTATION = 1.0, 0.10  # of a GPU: not measured, a usual allowance
PASSING = (STUDENT, TEACHER, LOSS, GRADIENTS, CACHE, UPDATE)
GENERATE, SCORE, TRAIN = PHASES = ("generate", "score", "train")
# Values an optimizer keeps per weight, where it is not Adam's two.
STATE_VALUES = {"sgd": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}
EIGHT_BIT_FROM = 4096  # weights of a tensor; bitsandbytes keeps 32 bits for smaller ones

Peaks = dict[str, Counter[str]]  # moment → part → bytes


@dataclass(frozen=True)
class Phase:
    """What one device holds when a phase needs most.

    Args:
        parts: GB (10⁹ bytes) each.
    """

    name: str
    parts: dict[str, float]

    @property
    def gb(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """All phases of a run."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.gb)


def teacher_resident(arguments: Arguments, phase: str, keeps_teacher: bool = True) -> bool:
    """Whether the teacher is on the device in a phase: in all of them, unless a server answers for it, or it is let
    go of before training.

    Args:
        keeps_teacher: Whether training asks it, see `Method`.
    """
    local = arguments.teacher.teacher_backend == "local"
    return local and (keeps_teacher or phase != TRAIN)


def usable(vram_gb: float) -> float:
    """What a plan may come to on a device of so many GB."""
    return (vram_gb - CONTEXT_GB) / (1 + FRAGMENTATION)


def longest(arguments: Arguments, completion: int) -> Lengths:
    """Of the longest example, cut at `max_length`."""
    prompt, limit = arguments.data.max_prompt_tokens, arguments.training.max_length
    if limit is None:
        return Lengths(prompt, completion)
    prompt = min(prompt, limit - 1)
    return Lengths(prompt, min(completion, limit - prompt))


@dataclass
class Planner:
    """The plan of one recipe.

    Args:
        arguments: The recipe.
        student: Config.
        teacher: Config.
        memory: The method's.
        device_type: Where it will run: `cuda` or `cpu`.
        lengths: Of examples; by default `longest`.
        keeps_teacher: Whether training asks the teacher, see `Method`. Where not, its output head, which the held-out
            check keeps, is not counted.
    """

    arguments: Arguments
    student: PretrainedConfig
    teacher: PretrainedConfig
    memory: CrossEntropy
    device_type: str
    lengths: Lengths | None = None
    keeps_teacher: bool = True

    def __post_init__(self) -> None:
        completion = self.memory.completion_tokens(self.arguments)
        self.lengths = self.lengths or longest(self.arguments, completion)
        self._steps: dict[int, Step] = {}
        self._measured: dict[tuple[int, bool], Peaks] = {}

    def plan(self) -> MemoryPlan:
        """Of the recipe as it is."""
        training = self.arguments.training
        return MemoryPlan(
            (
                self._generate,
                self._score,
                self.train(
                    training.per_device_train_batch_size, bool(training.gradient_checkpointing)
                ),
            )
        )

    def train(self, rows: int, checkpointing: bool) -> Phase:
        """Of micro-batches of so many rows; more than the recipe's are continued on a line, as layers are. The line
        begins at two rows, since one has no padding."""
        own = self.memory.trained_rows(
            self.arguments, self.arguments.training.per_device_train_batch_size
        )
        own, rows = max(2, own), self.memory.trained_rows(self.arguments, rows)
        if rows <= own:
            return self._phase(TRAIN, self.training_peaks(rows, checkpointing))
        points = {n: self.training_peaks(n, checkpointing) for n in (own, 2 * own)}
        return self._phase(TRAIN, _continued(points, rows))

    def largest_micro_batch(self, gb: float, checkpointing: bool) -> int:
        """The most rows that train within so many GB; 0 if not even one does."""
        own = self.arguments.training.per_device_train_batch_size
        most = own if self.train(own, checkpointing).gb <= gb else 0
        step = 1
        while self.train(most + step, checkpointing).gb <= gb:
            most += step
            step *= 2
        while step := step // 2:
            if self.train(most + step, checkpointing).gb <= gb:
                most += step
        return most

    # --- held all along

    @cached_property
    def held(self) -> Counter[str]:
        """Bytes by part, but for the teacher's weights."""
        points = {d: {"held": self._held_at(d)} for d in self._depths}
        return _continued(points, _layers(self.student))["held"]

    def _held_at(self, depth: int) -> Counter[str]:
        args, student = self.arguments, self._step(depth).student
        added = self._parameters_added(student)
        parts = Counter({name: sum(p.nbytes for p in own) for name, own in added.items()})
        trained = [p for p in student.parameters() if p.requires_grad]
        known = {id(p) for own in added.values() for p in own}
        own = [p for p in trained if id(p) not in known]
        if args.student.use_lora:
            parts["LoRA adapter"] = sum(p.nbytes for p in own)
        parts["student weights"] = _bytes(student) - parts.total()
        for name, itemsize in self.memory.copies(args).items():
            parts[name] = sum(p.numel() * (itemsize or p.itemsize) for p in own)
        optimizer = args.training.optim.value
        parts[f"optimizer ({optimizer})"] = sum(_state_bytes(p, optimizer) for p in trained)
        return parts

    @cached_property
    def _teacher_bytes(self) -> float:
        points = {d: {"held": self._teacher_at(d)} for d in self._teacher_depths}
        return _continued(points, _layers(self.teacher))["held"].total()

    def _teacher_at(self, depth: int) -> Counter[str]:
        return Counter(weights=_bytes(self._teacher(depth)))

    def _phase(self, name: str, peaks: Peaks) -> Phase:
        held = self.held
        parts = {part: held[part] for part in sorted(held, key=_order)}
        if teacher_resident(self.arguments, name, self.keeps_teacher):
            parts = {"teacher weights": self._teacher_bytes} | parts
            passing_parts = PASSING
        else:
            passing_parts = tuple(part for part in PASSING if part != TEACHER)
        moments = [{part: found[part] for part in passing_parts} for found in peaks.values()]
        passing = max(moments, key=lambda found: sum(found.values()), default={})
        parts |= {part: size for part, size in passing.items() if size > 0}
        return Phase(name, {part: size / GB for part, size in parts.items()})

    # --- models

    def _teacher(self, depth: int) -> PreTrainedModel:
        config = weightless.at_depth(self.teacher, depth)
        return weightless.teacher(config, self.arguments.teacher, self.arguments.student)

    def _parameters_added(self, student: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
        names = self.memory.modules(self.arguments, self.student, self.teacher)
        return {name: list(student.get_submodule(_as_name(name)).parameters()) for name in names}

    def _step(self, depth: int) -> Step:
        """Both models with few layers; the pairs are of the last ones."""
        if depth not in self._steps:
            args = self.arguments
            student = weightless.student(weightless.at_depth(self.student, depth), args.student)
            for name, module in self.memory.modules(args, self.student, self.teacher).items():
                student.add_module(_as_name(name), module)
            on_gpu = self.device_type != "cpu"
            if on_gpu:
                weightless.as_on_a_gpu(student)
            last = self._teacher_depths[0]
            teacher = self._teacher(last)
            meter = Meter()
            with meter:
                weightless.fill(student)
                weightless.fill(teacher)
            pairs = [(depth - n, last - n) for n in reversed(range(self._num_pairs))]
            self._steps[depth] = Step(args, student, teacher, meter, self.lengths, pairs, on_gpu)
        return self._steps[depth]

    @cached_property
    def _num_pairs(self) -> int:
        return len(self.memory.pairs(self.arguments, self.student, self.teacher))

    @cached_property
    def _depths(self) -> list[int]:
        return _two_depths(max(2, self._num_pairs), _layers(self.student))

    @cached_property
    def _teacher_depths(self) -> list[int]:
        return _two_depths(max(1, self._num_pairs), _layers(self.teacher))

    @contextmanager
    def _measuring(self, depth: int) -> Iterator[Step]:
        step = self._step(depth)
        with blocks_as_on(self.device_type), step.meter:
            step.meter.peaks = {}
            yield step

    # --- phases

    def training_peaks(self, rows: int, checkpointing: bool) -> Peaks:
        """What comes and goes in a training step, moment by moment."""
        key = rows, checkpointing
        if key not in self._measured:
            points = {d: self._train_at(d, rows, checkpointing) for d in self._depths}
            self._measured[key] = _continued(points, _layers(self.student))
        return self._measured[key]

    def _train_at(self, depth: int, rows: int, checkpointing: bool) -> Peaks:
        with self._measuring(depth) as step:
            step.train(self.memory.loss, rows, checkpointing)
        return step.meter.peaks

    @cached_property
    @torch.no_grad()
    def _score(self) -> Phase:
        """Without gradients no layer leaves anything behind: two will do."""
        args = self.arguments.training
        with self._measuring(self._depths[0]) as step:
            step.student.eval()
            step.meter.begin("reading")
            self.memory.score(step)
            if self.memory.evaluates and args.eval_strategy != "no":
                step.meter.begin("evaluation")
                self.memory.loss(step, args.per_device_eval_batch_size)
        return self._phase(SCORE, step.meter.peaks)

    @cached_property
    @torch.no_grad()
    def _generate(self) -> Phase:
        args = self.arguments
        rows = args.teacher.teacher_batch_size or DEFAULT_BATCH_SIZE
        if self.memory.writes_online(args) and args.teacher.teacher_batch_size is None:
            rows = max(rows, window(args))
        with self._measuring(self._depths[0]) as step:
            found = {}
            if teacher_resident(args, GENERATE):
                found = self._writing(step, step.teacher, self.teacher, rows, TEACHER)
            rows = self.memory.student_rows(args)
            if rows:
                step.student.eval()
                found |= self._writing(step, step.student, self.student, rows, STUDENT)
        return self._phase(GENERATE, found)

    def _writing(
        self, step: Step, model: PreTrainedModel, config: PretrainedConfig, rows: int, label: str
    ) -> Peaks:
        """Reading the prompts, and the last of the new tokens; only the cache grows with the layers."""
        found = step.write(model, rows, label)
        layers = Fraction(_layers(config), _layers(model.config))
        for parts in found.values():
            parts[CACHE] = int(parts[CACHE] * layers)
        return found


# --- arithmetic


def _layers(config: PretrainedConfig) -> int:
    return config.get_text_config().num_hidden_layers


def _two_depths(least: int, layers: int) -> list[int]:
    """Two to continue from, or the whole depth where that is no more."""
    return [layers] if layers <= least + 1 else [least, least + 1]


def _continued(points: dict[int, Peaks], at: int) -> Peaks:
    """A line through two points, for every part of every moment that both have."""
    if at in points:
        return points[at]
    (first, before), (second, after) = sorted(points.items())
    share = (at - first) / (second - first)
    moments = before.keys() & after.keys()
    return {name: _between(before[name], after[name], share) for name in moments}


def _between(before: Counter[str], after: Counter[str], share: float) -> Counter[str]:
    return Counter(
        {
            part: max(0, before[part] + (after[part] - before[part]) * share)
            for part in before.keys() | after.keys()
        }
    )


def _as_name(part: str) -> str:
    """Of the module behind a part of the plan."""
    return part.replace(" ", "_")


def _order(part: str) -> tuple[bool, bool, str]:
    return part.startswith("optimizer"), part != "student weights", part


def _bytes(model: nn.Module) -> int:
    """Of parameters and buffers, shared ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _state_bytes(parameter: nn.Parameter, optimizer: str) -> int:
    values = next((n for name, n in STATE_VALUES.items() if name in optimizer), 2)
    if "8bit" in optimizer and parameter.numel() >= EIGHT_BIT_FROM:
        return values * parameter.numel()
    itemsize = 4 if "8bit" in optimizer else parameter.itemsize
    return values * parameter.numel() * itemsize
