"""Do two tokenizers mean the same by their token ids?

Meditron's vocabulary is TinyLlama's with a few rows added, so the pair can be compared token by token
on the shared rows; Llama-2's and Qwen2's cannot be compared at all. This is proved, not assumed.
"""

from transformers import PreTrainedTokenizerBase

# Where tokenizers of one family have been seen to differ: Greek, units, digits, newlines, case, emoji.
PROBES = (
    "β-blockers lower heart rate; α₁-antitrypsin is made in the liver.",
    "Give 5 µg/kg/min, at most 0.25 mg ≥ twice daily (10⁹/L).",
    "HbA1c 7.5 %, Na+ 138 mmol/L, 37.8 °C, 120/80 mmHg",
    "First line.\n\n- a list item\n\tindented",
    "naïve café — “quoted” … 😷",
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
    student_tokens = {id: token for token, id in student.get_vocab().items() if id < size}
    teacher_tokens = {id: token for token, id in teacher.get_vocab().items() if id < size}
    if student_tokens != teacher_tokens:
        return None
    for text in PROBES:
        if student.encode(text, add_special_tokens=False) != teacher.encode(
            text, add_special_tokens=False
        ):
            return None
    return size
