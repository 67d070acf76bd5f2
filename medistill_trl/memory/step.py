"""One micro-batch on models without weights.

Shapes: B examples, T tokens of one, N completion tokens of all, H hidden size (each model has its own).
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from medistill_trl.layers import base_model, decoder_layers
from medistill_trl.losses.heads import OutputHead, states_before_head
from medistill_trl.losses.token_kl import completion_states
from medistill_trl.memory.meter import Meter
from medistill_trl.prompts import IGNORED
from medistill_trl.setting import Arguments

# Labels of what comes and goes
STUDENT, TEACHER, LOSS = "student activations", "teacher activations", "loss"
GRADIENTS, CACHE, UPDATE = "gradients", "KV cache", "optimizer's temporaries"
# Moments of a training step. Backward begins with everything that forward has kept, and ends with all gradients: what
# lies between the first and the last layer it comes to is between these two.
FORWARD, FIRST, BETWEEN, LAST = "forward", "backward begins", "backward", "backward ends"
STATE = "state"  # neither a part nor a moment of the plan, which knows it by arithmetic


# Dropout's masks are not drawn, so nothing has to be drawn again.
WITHOUT_RANDOM_STATE = {"use_reentrant": False, "preserve_rng_state": False}


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest example, the same for both models."""

    prompt: int
    completion: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass
class Step:
    """What a method's loss is taken on.

    Args:
        arguments: The recipe.
        student: Without weights, to train.
        teacher: Without weights; None where it is not on the device.
        meter: In force.
        lengths: Of every example.
        pairs: (student layer, teacher layer) that are compared, counted from 1.
        on_gpu: Where it will run.
    """

    arguments: Arguments
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    meter: Meter
    lengths: Lengths
    pairs: list[tuple[int, int]]
    on_gpu: bool

    def __post_init__(self) -> None:
        if self.arguments.training.gradient_accumulation_steps == 1:
            for parameter in self._trained:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self.meter.relabel(p.grad, GRADIENTS)
                )
        if self._dtype is not None:  # as accelerate prepares a model
            self.student.forward = convert_outputs_to_fp32(self.autocast()(self.student.forward))

    @property
    def _dtype(self) -> torch.dtype | None:
        """Of mixed precision."""
        args = self.arguments.training
        return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None

    def autocast(self) -> AbstractContextManager:
        return torch.autocast("cpu", self._dtype, enabled=self._dtype is not None)

    # --- the batch

    @property
    def rows(self) -> int:
        """B, by the recipe."""
        return self.arguments.training.per_device_train_batch_size

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    def inputs(self, rows: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, (B, T); as if one example of several were a token shorter, since
        such batches have padding nearly always, and attention takes more memory with a mask."""
        shape = rows, self.lengths.total
        mask = torch.ones(shape, dtype=torch.long)
        labels = torch.ones(shape, dtype=torch.long)
        labels[:, : self.lengths.prompt] = IGNORED
        if rows > 1:
            mask[0, -1], labels[0, -1] = 0, IGNORED
        return {
            "input_ids": torch.ones(shape, dtype=torch.long),
            "attention_mask": mask,
            "labels": labels,
        }

    def example(self) -> dict[str, list[int]]:
        """One of them, as `encode_example` gives it."""
        labels = [IGNORED] * self.lengths.prompt + [1] * self.lengths.completion
        return {"input_ids": [1] * self.lengths.total, "labels": labels}

    # --- forward

    @property
    def student_head(self) -> OutputHead:
        return OutputHead.of(self.student)

    def student_hidden(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, T, H), by the forward that the trainers take."""
        with self.meter.label(STUDENT):
            self.mark_moments()
            hidden_BTH, _ = states_before_head(self.student, self.student, inputs)
        self.follow(hidden_BTH)
        return hidden_BTH

    def follow(self, tensor: torch.Tensor) -> None:
        """Once its gradient is known, backward is the student's own."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.meter.switch(STUDENT))

    def student_states(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """States that predict completion tokens, (N, H), and these tokens (N,)."""
        hidden_BTH = self.student_hidden(inputs)
        with self.meter.label(LOSS):
            return completion_states(hidden_BTH, inputs["labels"])

    @torch.no_grad()
    def teacher_states(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the teacher."""
        with self.meter.label(TEACHER):
            hidden_BTH = self.teacher.get_decoder()(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).last_hidden_state
            return completion_states(hidden_BTH, inputs["labels"])

    # --- backward

    def mark_moments(self) -> None:
        """Of the backward pass of the next forward."""
        blocks = decoder_layers(self.student)
        hooks = []

        def mark(number: int):
            def seen(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
                hooks[number].remove()  # not when it is computed again
                if not output.requires_grad:
                    return
                if number == len(blocks) - 2 and number > 0:
                    output.register_hook(lambda _: self.meter.begin(BETWEEN))
                if number == 0:
                    output.register_hook(lambda _: self.meter.begin(LAST))

            return seen

        hooks += [block.register_forward_hook(mark(n)) for n, block in enumerate(blocks)]

    def train(self, loss_function: Callable, rows: int, checkpointing: bool) -> None:
        """Forward and backward of a micro-batch, which if there are several is not the window's first.

        Args:
            loss_function: (step, rows) → loss, a scalar.
        """
        base = base_model(self.student)
        if checkpointing:  # as Trainer switches it on
            base.activation_checkpointing_enable(WITHOUT_RANDOM_STATE)
        self.meter.begin(FORWARD)
        if self.arguments.training.gradient_accumulation_steps > 1:
            with self.meter.label(GRADIENTS):
                for parameter in self._trained:
                    parameter.grad = torch.zeros_like(parameter)
        self.student.train()
        loss = loss_function(self, rows)
        self.meter.begin(FIRST)
        with self.meter.label(LOSS):
            loss.backward()
        if self.arguments.training.optim.value == "adamw_torch":
            self._update()
        for parameter in self._trained:
            parameter.grad = None
        if checkpointing:
            base.activation_checkpointing_disable()

    def _update(self) -> None:
        """Torch's plain AdamW makes temporaries: of a tensor at a time on a CPU, of all at once on a GPU. Fused and
        8-bit ones make none."""
        optimizer = torch.optim.AdamW(self._trained, foreach=self.on_gpu)
        self.meter.begin(STATE)
        with self.meter.label(STATE):
            optimizer.step()
        self.meter.begin(UPDATE)
        with self.meter.label(UPDATE):
            optimizer.step()

    # --- writing

    def write(self, model: PreTrainedModel, rows: int, label: str) -> dict[str, Counter[str]]:
        """What takes most while prompts are read, and while the last of the new tokens is written.

        Returns:
            Moment → part → bytes: `label`, and `CACHE` of all of the model's layers.
        """
        mask = torch.ones(rows, self.lengths.total, dtype=torch.long)
        mask[0, 0] = 0  # padding is on the left
        found = {}
        for name, known, new in (
            ("reads", 0, self.lengths.prompt),
            ("writes", self.lengths.total - 1, 1),
        ):
            moment = f"{label} {name}"
            mixed = self.autocast() if model is self.student else nullcontext()
            with self.meter.label(label), mixed:
                cache = _cache(model, rows, known)
                self.meter.begin(moment)
                model(
                    input_ids=torch.ones(rows, new, dtype=torch.long),
                    attention_mask=mask[:, : known + new],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            rest = self.meter.peaks[moment][label] - size
            found[moment] = Counter({label: max(0, rest), CACHE: size})
            del cache
        return found


def _cache(model: PreTrainedModel, rows: int, length: int) -> DynamicCache:
    """Of `length` tokens already read."""
    config = model.config.get_text_config()
    cache = DynamicCache(config=config)
    if length:
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = rows, getattr(config, "num_key_value_heads", None) or heads, length, size
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.empty(shape, dtype=model.dtype) for _ in range(2))
            cache.update(keys, values, layer)
    return cache
