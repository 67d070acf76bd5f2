"""Do two tokenizers mean the same by their token ids?

Meditron's vocabulary is TinyLlama's with a few rows added, so the pair can be compared token by token
on the shared rows. This is proved, not assumed. Llama-2's and Qwen2's ids have nothing in common, but
many of their tokens stand for the same bytes, see `overlap`.
"""

from transformers import PreTrainedTokenizerBase

from medistill_trl.errors import UserError

# Where tokenizers of one family have been seen to differ: Greek, units, digits, newlines, case, emoji.
PROBES = (
    "β-blockers lower heart rate; α₁-antitrypsin is made in the liver.",
    "Give 5 µg/kg/min, at most 0.25 mg ≥ twice daily (10⁹/L).",
    "HbA1c 7.5 %, Na+ 138 mmol/L, 37.8 °C, 120/80 mmHg",
    "First line.\n\n- a list item\n\tindented",
    "naïve café — “quoted” … 😷",
)


def require_shared_vocabulary(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    method: str,
    others: list[str],
    across: bool = False,
) -> None:
    """Refuse a pair whose distributions cannot be compared token by token.

    Args:
        method: Which wants to compare them.
        others: Methods that need the teacher's text only.
        across: The method could compare spans.

    Raises:
        UserError: naming a token or text on which the tokenizers differ, and what does work.
    """
    difference = _difference(student, teacher, min(len(student), len(teacher)))
    if difference:
        spans = (
            "; or cross_tokenizer: auto, which compares spans of the same text" if across else ""
        )
        raise UserError(
            f"{method} compares the two models token by token, and their tokenizers differ: {difference}. "
            f"For this pair take a method that passes text: {', '.join(others)}; or a student with the "
            f"teacher's tokenizer{spans}."
        )


def shared_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> int | None:
    """Number of leading token ids that both tokenizers agree on.

    Returns:
        The size of the smaller vocabulary if every id below it stands for the same token in both and
        the probe texts are encoded alike; None if the tokenizers differ.
    """
    size = min(len(student), len(teacher))
    return None if _difference(student, teacher, size) else size


def _difference(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, size: int
) -> str | None:
    """The first thing on which the tokenizers differ below `size`, for a message; None if nothing."""
    tokens = [
        {id: token for token, id in tokenizer.get_vocab().items() if id < size}
        for tokenizer in (student, teacher)
    ]
    if tokens[0] != tokens[1]:
        id = next(id for id in range(size) if tokens[0].get(id) != tokens[1].get(id))
        return f"token {id} is {tokens[0].get(id)!r} for the student, {tokens[1].get(id)!r} for the teacher"
    special = [token for token in student.all_special_tokens if token in teacher.get_vocab()]
    for text in (*PROBES, *(f"before {token} after" for token in special)):
        ids = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in (student, teacher)]
        if ids[0] != ids[1]:
            return f"{text[:40]!r} has the token ids {ids[0][:8]} for the student, {ids[1][:8]} for the teacher"
    return None
