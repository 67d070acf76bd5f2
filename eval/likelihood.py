"""lm-eval's Hugging Face model over a loaded subject, without a batch × time × vocabulary tensor.

Encoding, the split of prompt and continuation, and truncation from the left are lm-eval's. Only how the
likelihoods are computed is replaced: hidden states go through the output head at the few positions that
predict a continuation, in float32, and continuations of the same prompt share one forward.

Shapes: B sequences, T time, H hidden size, V vocabulary, N positions that predict something.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence

from eval.batching import BatchSize
from eval.subjects import Subject
from medistill_trl.losses.heads import OutputHead

# It warns that models are loaded already, and of every prompt it truncates, which is counted here.
logging.getLogger("lm_eval").setLevel(logging.ERROR)

Tokens = tuple[int, ...]
Likelihood = tuple[float, bool]  # log-probability, and whether greedy decoding would write it


@dataclass(frozen=True)
class Forward:
    """One sequence that goes through the model.

    Args:
        context: The prompt, truncated as far as need be.
        tail: What follows it: all but the last token of the longest continuation served.
        continuations: Those whose tokens the context and the tail's beginnings predict.
    """

    context: Tokens
    tail: Tokens
    continuations: tuple[Tokens, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.tail)


def shared_forwards(pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Forward]:
    """The fewest forwards that predict every continuation of every context, longest first."""
    by_context: dict[Tokens, list[Tokens]] = {}
    for context, continuation in pairs:
        by_context.setdefault(context, []).append(continuation)
    forwards = []
    for context, continuations in by_context.items():
        tails: list[Tokens] = []
        for tail in sorted({c[:-1] for c in continuations}, key=len, reverse=True):
            if not any(_begins(longer, tail) for longer in tails):
                tails.append(tail)
        for tail in tails:
            served = tuple(c for c in continuations if _begins(tail, c[:-1]))
            forwards.append(Forward(context, tail, served))
    return sorted(forwards, key=len, reverse=True)


def _begins(tokens: Tokens, start: Tokens) -> bool:
    return tokens[: len(start)] == start


class SubjectLM(HFLM):
    """What lm-eval's tasks are asked of.

    Args:
        subject: The model.
        batch_size: Sequences in one forward; is halved when memory runs out.
    """

    def __init__(self, subject: Subject, batch_size: BatchSize):
        super().__init__(pretrained=subject.model, tokenizer=subject.form.tokenizer)
        self._sequences = batch_size
        self._head = OutputHead.of(subject.model)
        self.cut_tokens: dict[str, int] = {}  # of a prompt, by truncation from the left

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[Likelihood]:
        """As lm-eval's, without its progress bars: the item store draws one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm=True, override_bs=None):
        pairs = [self._truncate(texts[0], *map(tuple, ids)) for texts, *ids in requests]
        forwards = shared_forwards(pairs)
        found: dict[tuple[Tokens, Tokens], Likelihood] = {}
        for forward, likelihoods in zip(
            forwards, self._sequences.map(self._likelihoods, forwards), strict=True
        ):
            for continuation, likelihood in zip(forward.continuations, likelihoods, strict=True):
                found[forward.context, continuation] = likelihood
        return [found[pair] for pair in pairs]

    def _truncate(
        self, prompt: str, context: Tokens, continuation: Tokens
    ) -> tuple[Tokens, Tokens]:
        """The context without what exceeds the model's length; its last token is never an input."""
        excess = max(0, len(context) + len(continuation) - 1 - self.max_length)
        if excess:
            self.cut_tokens[prompt] = max(excess, self.cut_tokens.get(prompt, 0))
        return context[excess:], continuation

    @torch.no_grad()
    def _likelihoods(self, forwards: Sequence[Forward]) -> list[list[Likelihood]]:
        """Those of every continuation of some forwards, which go through the model together."""
        inputs = [torch.tensor(forward.context + forward.tail) for forward in forwards]
        # What stands in the padding is masked and on the right: any token will do.
        hidden_BTH = self.model.get_decoder()(
            input_ids=pad_sequence(inputs, True).to(self.device),
            attention_mask=pad_sequence([torch.ones_like(i) for i in inputs], True).to(self.device),
            use_cache=False,
        ).last_hidden_state
        states_NH = torch.cat(
            [hidden_BTH[b, len(f.context) - 1 : len(f)] for b, f in enumerate(forwards)]
        )
        logits_NV = self._head.project(states_NH, torch.float32, track=False).logits_CV
        log_probs_NV = logits_NV.log_softmax(-1)
        per_forward = log_probs_NV.split([len(forward.tail) + 1 for forward in forwards])
        return [
            [_likelihood(log_probs, continuation) for continuation in forward.continuations]
            for forward, log_probs in zip(forwards, per_forward, strict=True)
        ]


def _likelihood(log_probs_TV: torch.Tensor, continuation: Tokens) -> Likelihood:
    """Of a continuation whose t-th token the t-th row predicts."""
    tokens = torch.tensor(continuation, device=log_probs_TV.device)
    rows = log_probs_TV[: len(tokens)]
    total = rows.gather(1, tokens[:, None]).sum().item()
    return total, bool((rows.argmax(-1) == tokens).all())
