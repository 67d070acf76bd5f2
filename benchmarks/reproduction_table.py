"""The report's claims about SFT and Logit-KD beside what was measured: one row a quantity.

Pure functions from measurements to markdown.
"""

from dataclasses import dataclass
from statistics import mean, stdev

from benchmarks.fidelity import TOP_K

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# measurements[method][seed][quantity]
Measurements = dict[str, dict[int, dict[str, float]]]


@dataclass(frozen=True)
class Quantity:
    """One row.

    Args:
        name: Key in the measurements.
        label: As the table says it.
        kd_sign: Sign of Logit-KD − SFT that the report states: −1, +1, or 0 if it states none.
        claim: The report's statement in words.
    """

    name: str
    label: str
    kd_sign: int = 0
    claim: str = "–"


QUANTITIES = (
    Quantity("train_ce", "train loss: CE, nats per token", +1, "SFT lower"),
    Quantity("heldout_ce", "held-out loss: CE, nats per token", +1, "SFT lower"),
    Quantity("rouge_l", "text similarity: ROUGE-L F1", -1, "SFT more similar"),
    Quantity("exact_match", "exact match: whole answers", +1, "Logit-KD higher"),
    Quantity("token_match", "exact match: tokens, by position", +1, "Logit-KD higher"),
    Quantity("kl", "KL(T‖S), nats per token", -1, "Logit-KD lower"),
    Quantity("js", "JS, nats per token", -1, "Logit-KD lower"),
    Quantity("top_k", f"top-{TOP_K} overlap"),
    Quantity("top_1", "top-1 agreement"),
    Quantity("own_loss", "the trainer's own last training loss (not the same quantity)"),
)


def verdict(differences: list[float], kd_sign: int) -> str:
    """Did Logit-KD − SFT have the stated sign?

    Args:
        differences: One per seed.
        kd_sign: The stated sign; 0 for none.
    """
    if kd_sign == 0:
        return "–"
    if all(d == 0 for d in differences):
        return "tie"
    signed = [d * kd_sign for d in differences]
    if all(d > 0 for d in signed):
        return "reproduced"
    return f"not reproduced ({'opposite' if all(d < 0 for d in signed) else 'mixed'})"


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation; a single value by itself."""
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{deviation}"


def row(quantity: Quantity, measurements: Measurements) -> str:
    """A line of the table."""
    sft, kd = ([m[quantity.name] for m in measurements[x].values()] for x in ("sft", "logit_kd"))
    differences = [b - a for a, b in zip(sft, kd, strict=True)]
    cells = [
        quantity.label,
        spread(sft),
        spread(kd),
        ", ".join(f"{d:+.3f}" for d in differences),
        quantity.claim,
        verdict(differences, quantity.kd_sign),
    ]
    return f"| {' | '.join(cells)} |"


def table(measurements: Measurements) -> str:
    """All quantities, as markdown.

    Args:
        measurements: Of `sft` and `logit_kd`, each of the same seeds in the same order.
    """
    seeds = ", ".join(map(str, measurements["sft"]))
    head = [
        f"| | SFT | Logit-KD | Logit-KD − SFT, seeds {seeds} | the report | here |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row(quantity, measurements) for quantity in QUANTITIES)])


def insert(document: str, results: str) -> str:
    """The document with what stands between its two markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{results.strip()}\n{END}{after}"
