"""What an evaluation is asked to do, as dataclasses whose fields are the command's flags.

A part that needs a setting of its own adds a field to `Options`, with `help`, bounds to `LIMITS`, and `parts`: the
parts whose results depend on it, where that is not all of them.
Importing this loads no torch.
"""

import argparse
import math
import types
from dataclasses import MISSING, dataclass, field, fields
from typing import get_args, get_origin, get_type_hints

from medistill_trl.errors import UserError

BENCHMARKS = ("medqa", "medmcqa", "pubmedqa", "pubhealth", "pubhealth_2class")


def batch_size(text: str) -> int | None:
    """`auto` (None) or a number of items."""
    return None if text == "auto" else int(text)


@dataclass(frozen=True)
class Options:
    """Settings of the measurements. They are part of what a result is, and stand in its file."""

    LIMITS = {
        "limit": {"min": 1},
        "batch_size": {"min": 1},
        "few_shot": {"min": 0, "max": 16},
        "option_shuffles": {"min": 0},
        "window": {"min": 2},
        "stride": {"min": 1},
        "fidelity_questions": {"min": 1},
        "max_new_tokens": {"min": 1},
        "prefix_temperature": {"min": 0},
        "answer_tokens": {"min": 1},
        "generative_tokens": {"min": 1},
    }

    limit: int | None = field(
        default=None, metadata={"help": "Only the first N items of every data file."}
    )
    batch_size: int | None = field(
        default=None,
        metadata={
            "parts": ("speed",),
            "help": "Items in one forward. auto: on CPU 16 to write and 1 to read; on a GPU 64, halved while memory runs out.",
            "parse": batch_size,
        },
    )
    benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "parts": ("benchmarks", "generative", "retention", "quantisation"),
            "help": "Only these.",
            "choices": BENCHMARKS,
        },
    )
    few_shot: int = field(
        default=0,
        metadata={
            "parts": ("benchmarks", "retention", "quantisation"),
            "help": "Solved examples before each benchmark question.",
        },
    )
    option_shuffles: int = field(
        default=1,
        metadata={
            "parts": ("benchmarks",),
            "help": "Other orders of the options in which lettered questions are asked once more; each "
            "costs as much as the benchmark.",
        },
    )
    seed: int = field(default=42, metadata={"help": "Of every draw."})
    window: int | None = field(
        default=None,
        metadata={
            "parts": ("perplexity",),
            "help": "Tokens read at once for perplexity; by default what both models attend to, up to 2048.",
        },
    )
    stride: int | None = field(
        default=None,
        metadata={
            "parts": ("perplexity",),
            "help": "Tokens from one such window to the next; by default half a window. Fewer give each "
            "token more context and cost more.",
        },
    )
    fidelity_questions: int = field(
        default=512,
        metadata={
            "parts": ("fidelity", "speed", "quantisation"),
            "help": "Held-out questions on whose answers teacher and student are compared.",
        },
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "parts": ("fidelity", "speed", "quantisation"),
            "help": "Longest answer drawn from either model for fidelity; by default what the run's teacher "
            "wrote for training, 128 without a run.",
        },
    )
    prefix_temperature: float = field(
        default=0.0,
        metadata={
            "parts": ("fidelity", "quantisation"),
            "help": "Sampling temperature of the answers used as prefixes; 0 is greedy.",
        },
    )
    encoder: str | None = field(
        default=None,
        metadata={
            "parts": ("fidelity",),
            "help": "Sentence encoder for semantic similarity, a hub id or folder; by default "
            "all-MiniLM-L6-v2.",
        },
    )
    teacher_quantisation: str | None = field(
        default=None,
        metadata={
            "parts": ("quantisation",),
            "help": "Also measure what this quantisation costs the teacher; it is then loaded twice, in full "
            "precision and quantised.",
            "choices": ["nf4", "int8"],
        },
    )
    verifier: str | None = field(
        default=None,
        metadata={
            "parts": ("faithfulness",),
            "help": "Cross-encoder for natural language inference that judges claims (faithfulness): a hub id or "
            "a folder. Without it the answers are drawn and not judged.",
        },
    )
    answer_tokens: int = field(
        default=128,
        metadata={
            "parts": ("faithfulness",),
            "help": "Longest answer with evidence (faithfulness), in tokens.",
        },
    )
    generative_tokens: int | None = field(
        default=None,
        metadata={
            "parts": ("generative", "retention"),
            "help": "Longest written answer to a benchmark question (generative), in tokens; by default what the "
            "recipe allows a rationale, 32 where the run has none.",
        },
    )

    def __post_init__(self) -> None:
        for name, limits in self.LIMITS.items():
            _check(name, getattr(self, name), limits)


def options_of(part: str) -> set[str]:
    """Names of the options on which a part's result depends."""
    return {item.name for item in fields(Options) if part in item.metadata.get("parts", (part,))}


@dataclass(frozen=True)
class ModelOptions:
    """Models to evaluate without a run. For a run its recipe says all of this."""

    LIMITS = {}

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local folder (an adapter's too), .gguf file or package:NAME/FILE.gguf."
        },
    )
    teacher: str | None = field(
        default=None, metadata={"help": "The model it is measured against; the same kinds of name."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of --model on the hub."}
    )
    teacher_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of --teacher on the hub."}
    )
    keep_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Evaluate --model with only these decoder layers, counted from 0."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Of both models; by default float32 on CPU and bfloat16 on a GPU.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Load --model in 4-bit."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load --model in 8-bit."})
    teacher_load_in_4bit: bool = field(default=False, metadata={"help": "Load --teacher in 4-bit."})
    teacher_load_in_8bit: bool = field(default=False, metadata={"help": "Load --teacher in 8-bit."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "Instruction before every question the models answer."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with a model."}
    )


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """One flag for each field of an options dataclass."""
    hints = get_type_hints(options)
    group = parser.add_argument_group(options.__doc__.partition("\n")[0].rstrip("."))
    for item in fields(options):
        choices = item.metadata.get("choices")
        text = item.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
        group.add_argument(f"--{item.name}", help=text, **_flag(item, hints))


def _flag(item, hints: dict) -> dict:
    """argparse's words for a field: a bool is a switch, a list takes several values."""
    default = None if item.default is MISSING else item.default
    shown = {"default": default, "choices": item.metadata.get("choices")}
    kind = hints[item.name]
    if isinstance(kind, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not types.NoneType)
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
        shown["nargs"] = "+"
    metavar = "X" if kind is str else "N"
    return {**shown, "metavar": metavar, "type": item.metadata.get("parse", kind)}


def from_flags(options: type, parsed: argparse.Namespace):
    """The options dataclass from parsed flags."""
    return options(**{item.name: getattr(parsed, item.name) for item in fields(options)})


def _check(name: str, value: float | None, limits: dict[str, float]) -> None:
    if value is None:
        return
    if not math.isfinite(value):
        raise UserError(f"--{name}: must be finite, got {value}")
    for bound, wrong, words in (
        ("min", lambda limit: value < limit, "at least"),
        ("max", lambda limit: value > limit, "at most"),
        ("above", lambda limit: value <= limit, "above"),
        ("below", lambda limit: value >= limit, "below"),
    ):
        if bound in limits and wrong(limits[bound]):
            raise UserError(f"--{name}: must be {words} {limits[bound]}, got {value}")
