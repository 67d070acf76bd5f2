"""The held-out check over a run's steps."""

HELDOUT = ("kl_nats", "ce_nats", "top1")


def heldout_curve(record: dict, key: str) -> tuple[list[int], list[float]]:
    """Optimizer steps and values of one quantity: before training, at every evaluation, and at the end.

    Args:
        record: results/run.json.
        key: One of `HELDOUT`.

    Returns:
        Both empty where the quantity is not defined: KL and top-1 of different tokenizers.
    """
    before, after = (record["heldout"][when][key] for when in ("before", "after"))
    if after is None:
        return [], []
    history = record["log_history"]
    last = max(entry["step"] for entry in history)
    name = f"heldout_{key}"
    between = [(e["step"], e[name]) for e in history if name in e and e["step"] < last]
    points = [(0, before), *between, (last, after)]
    return [step for step, _ in points], [value for _, value in points]
