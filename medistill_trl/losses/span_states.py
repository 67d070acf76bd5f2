"""States of one model pooled over spans, so that models with different tokenizers can be compared.

A span is the smallest piece of text that both models have cut into whole tokens, see `medistill_trl.spans`.

Shapes: H hidden size, N completion tokens of the batch, S spans of the batch.
"""

import torch

POOLINGS = ("mean", "first")


def span_states(
    states_NH: torch.Tensor, bounds_S2: torch.Tensor, pooling: str = "mean"
) -> torch.Tensor:
    """The states that predict a span's tokens, pooled; those of a token alone as they are.

    `mean` of them; or the `first`, where a model has read all of the text before the span and nothing of it, so
    that both models have read the same.

    Args:
        states_NH: States that predict completion tokens, from `completion_states`.
        bounds_S2: Rows [start, end) of each span.
        pooling: One of `POOLINGS`.

    Returns:
        (S, H), float32 (float64 for such states), with the graph.

    Raises:
        ValueError: an unknown pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} does not exist; one of {', '.join(POOLINGS)}")
    dtype = torch.float64 if states_NH.dtype == torch.float64 else torch.float32
    starts_S, lengths_S = bounds_S2[:, 0], bounds_S2[:, 1] - bounds_S2[:, 0]
    if pooling == "first":
        return states_NH[starts_S].to(dtype)
    span_M = torch.arange(len(starts_S), device=starts_S.device).repeat_interleave(lengths_S)
    before_S = lengths_S.cumsum(0) - lengths_S  # tokens of earlier spans
    token_M = torch.arange(len(span_M), device=starts_S.device) + (starts_S - before_S)[span_M]
    sums_SH = states_NH.new_zeros(len(starts_S), states_NH.shape[1], dtype=dtype)
    return sums_SH.index_add(0, span_M, states_NH[token_M].to(dtype)) / lengths_S[:, None]
