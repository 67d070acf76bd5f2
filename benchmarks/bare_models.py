"""What no training step can do without: forwards and backwards of the models, and nothing else.

Whole models with the products of their output heads at completion tokens alone, a chunk at a time as the losses
take them; no softmax, no loss, no collation. What flows back is the logits: a product does not care.

Shapes: B batch, T time, N completion tokens of the batch, C tokens of a chunk, H hidden size, V vocabulary, P prompt
tokens.
"""

import torch
from transformers import PreTrainedModel

from medistill_trl.layers import base_model, captured, run_through
from medistill_trl.losses.chunked import CHUNK_SIZE
from medistill_trl.losses.token_kl import completion_states


@torch.no_grad()
def read(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor | None = None,
    last_layer: int | None = None,
) -> None:
    """One forward without gradient.

    Args:
        model: With or without an adapter.
        input_ids: (B, T).
        attention_mask: (B, T).
        labels: (B, T), `IGNORED` outside of completions, whose states go through the head; None for no head.
        last_layer: Where the forward ends, counted from 1; None for the whole trunk.
    """
    if last_layer is not None:
        with captured(model, [last_layer]):
            run_through(model, last_layer, input_ids, attention_mask)
        return
    base = base_model(model)
    hidden_BTH = _trunk(base, input_ids, attention_mask)
    if labels is not None:
        states_NH, _ = completion_states(hidden_BTH, labels)
        weight_VH = base.get_output_embeddings().weight
        for states_CH in states_NH.split(CHUNK_SIZE):
            _ = states_CH @ weight_VH.T


def learn(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    with_head: bool = True,
) -> None:
    """One forward and its backward.

    Args:
        model: In training mode, with or without an adapter.
        input_ids: (B, T).
        attention_mask: (B, T).
        labels: (B, T), `IGNORED` outside of completions. Backward begins at the states that predict these.
        with_head: Go through the output head, forth and back.
    """
    base = base_model(model)
    states_NH, _ = completion_states(_trunk(base, input_ids, attention_mask), labels)
    if not with_head:
        states_NH.backward(torch.ones_like(states_NH))
        return
    weight_VH = base.get_output_embeddings().weight
    gradient_NH = torch.empty_like(states_NH)
    gradient_VH = torch.zeros_like(weight_VH) if weight_VH.requires_grad else None
    with torch.no_grad():
        for start in range(0, len(states_NH), CHUNK_SIZE):
            rows = slice(start, start + CHUNK_SIZE)
            logits_CV = states_NH[rows] @ weight_VH.T
            gradient_NH[rows] = logits_CV @ weight_VH
            if gradient_VH is not None:
                gradient_VH.addmm_(logits_CV.T, states_NH[rows])
    states_NH.backward(gradient_NH)
    if gradient_VH is not None:  # there is one already if the embedding is tied
        grad_VH = weight_VH.grad
        weight_VH.grad = gradient_VH if grad_VH is None else grad_VH.add_(gradient_VH)


@torch.no_grad()
def write(model: PreTrainedModel, prompts: dict[str, torch.Tensor], tokens: int) -> None:
    """Plain `generate`, sampling, of exactly as many tokens.

    Args:
        model: Its training mode is restored.
        prompts: `input_ids` and `attention_mask`, (B, P), padded on the left.
        tokens: Of each row.
    """
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        model.generate(
            **prompts,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            use_cache=True,
        )
    model.train(was_training)


def _trunk(
    base: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    decoder = base.get_decoder()
    return decoder(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state
