"""Whether a model is whole: one with missing or broken weights is refused, not trained on or measured.

transformers fills in random numbers for weights that a folder lacks, and only logs it; its own checks of a
damaged folder raise whatever the damage leads to.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from medistill_trl.errors import UserError, first_line

# What reading and building a model raises where its files are not what they should be.
DAMAGE = (
    OSError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RecursionError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TemplateError,
)
CUSTOM_CODE = "trust_remote_code"  # stands in what transformers says of a model that needs it
SHOWN = 3  # names of a message


@contextmanager
def reading(name: str, what: str, advice: str) -> Iterator[None]:
    """Turn what a damaged model makes a library raise into an error that names the model.

    Only around calls of a library on the model's files. Running out of memory is no damage.

    Args:
        name: Of the model.
        what: That is read: its tokenizer, its weights.
        advice: What to do.

    Raises:
        UserError: naming model, part, the library's reason and the advice.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UserError:
        raise
    except Exception as error:
        # tokenizers has no class of its own for its errors: they are plain Exceptions.
        if not isinstance(error, DAMAGE) and type(error) is not Exception:
            raise
        if CUSTOM_CODE in str(error):
            raise UserError(
                f"model {name}: it brings Python code of its own, which is not run here; only if you trust whoever wrote "
                "it, say so with trust_remote_code"
            ) from error
        kind = (
            type(error).__name__ + ": " if isinstance(error, LookupError | AttributeError) else ""
        )
        raise UserError(
            f"model {name}: its {what} cannot be loaded ({kind}{first_line(error)}); {advice}"
        ) from error


def check_complete(name: str, loading: dict) -> None:
    """Refuse a model some of whose weights its files lack.

    Args:
        loading: What `from_pretrained(..., output_loading_info=True)` says.
    """
    missing = sorted(loading["missing_keys"])
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", …" if len(missing) > SHOWN else "")
        raise UserError(
            f"model {name}: its files lack {len(missing)} of its weights ({shown}), which would be random numbers; "
            "download it again, or check that config.json belongs to these weights"
        )


@torch.no_grad()
def check_sound(name: str, model: PreTrainedModel) -> None:
    """Refuse a model with NaN or infinite weights, or that cannot read a token.

    Weights that another process holds are passed over.

    Raises:
        UserError: naming the weight, or what the model makes of a token.
    """
    shipped = model.generation_config.eos_token_id
    ends = shipped if isinstance(shipped, list) else [shipped]
    if any(type(end) not in (int, type(None)) for end in ends):
        raise UserError(
            f"model {name}: its generation_config.json names {shipped!r} as the end of a text, which is no token id; "
            "mend it, or download the model again"
        )
    whole = True
    for key, weight in model.named_parameters():
        if weight.is_meta or weight.numel() == 0:
            whole = False
        elif weight.is_floating_point() and not _all_finite(weight):
            raise UserError(
                f"model {name}: its weight {key} holds NaN or infinity; its files are damaged or were saved by a run "
                "that failed, or float16 is too narrow for it (bfloat16 is not)"
            )
    if not whole:
        return
    advice = "config.json does not belong to these weights, or is damaged; download the model again"
    with reading(name, "first token", advice):
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise UserError(
            f"model {name}: gives NaN or infinity for a token; its files are damaged, or its dtype is too narrow "
            "(float16 overflows where bfloat16 does not)"
        )


def _all_finite(weight: torch.Tensor) -> bool:
    """Whether none of it is NaN or infinite, in one pass and without a tensor of its size: NaN is the extreme of what
    holds one."""
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(weight))
