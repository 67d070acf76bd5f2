"""The judge of claims: a natural language inference cross-encoder, and how good it is itself.

    does the premise (a passage) entail the claim, contradict it, or neither?

Models of the field differ in the order of their labels, so labels are found by name in `config.id2label`.
A model without entailment or contradiction among its labels is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from accelerate import PartialState
from sentence_transformers import CrossEncoder

from eval.batching import BatchSize
from medistill_trl.errors import UserError
from medistill_trl.model_checks import reading
from medistill_trl.model_source import WEIGHTS_ADVICE, ModelSource, resolve

TRIAL = "The knee is swollen."
WANTED = ("entailment", "contradiction")
ADVICE = (
    "name one trained on natural language inference in three classes, such as "
    "cross-encoder/nli-deberta-v3-base, or set id2label in its config.json"
)

OFFLINE_ADVICE = "a verifier is a hub id or a folder: without the hub, give --verifier a folder"

Pair = tuple[str, str]  # premise, claim


@dataclass(frozen=True)
class Verdict:
    """How a premise bears on a claim: probabilities, from 0 to 1.

    Args:
        entailment: That the claim follows from the premise.
        contradiction: That it cannot be true if the premise is.
        cut: The pair was longer than the verifier reads, so the premise lost its end.
    """

    entailment: float
    contradiction: float
    cut: bool = False


class Verifier(Protocol):
    """What judges pairs of premise and claim."""

    source: str  # for a reader
    fingerprint: str  # names the exact weights

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair, in their order."""


class CrossEncoderVerifier:
    """An NLI cross-encoder of the hub or of a local folder; its weights are loaded at the first judgement.

    Args:
        name: Hub id or folder.
        batch_size: Pairs in one forward; None for as many as the memory holds.

    Raises:
        UserError: there is no such model, or its labels do not say what entails and what contradicts.
    """

    def __init__(self, name: str, batch_size: int | None = None):
        self._found: ModelSource = resolve(name, advice=OFFLINE_ADVICE)
        self._entails, self._contradicts = label_places(name, self._found.config.id2label)
        self._batches = BatchSize.of(batch_size, PartialState().device)
        self.source, self.fingerprint = name, self._found.fingerprint

    @cached_property
    def _model(self) -> CrossEncoder:
        with reading(self.source, "weights", WEIGHTS_ADVICE):
            return CrossEncoder(
                self._found.location,
                revision=self._found.revision,
                device=str(PartialState().device),
                model_kwargs={"use_safetensors": True},  # a pickle may run code when it is opened
            ).float()

    def check(self) -> None:
        """Load the weights, judge once and let go of them: a broken verifier is found before anything long begins.

        Raises:
            UserError: its weights cannot be read, or give NaN or infinity.
        """
        (verdict,) = self.judge([(TRIAL, TRIAL)])
        del self._model
        if not math.isfinite(verdict.entailment + verdict.contradiction):
            raise UserError(
                f"--verifier {self.source}: gives NaN or infinity for a sentence; its files are damaged; {WEIGHTS_ADVICE}"
            )

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair, in their order; float32."""
        ordered = sorted(range(len(pairs)), key=lambda n: -len("".join(pairs[n])))
        found = self._batches.map(self._judge, [pairs[n] for n in ordered])
        return [verdict for _, verdict in sorted(zip(ordered, found, strict=True))]

    def _judge(self, batch: Sequence[Pair]) -> list[Verdict]:
        probabilities = self._model.predict(
            list(batch),
            batch_size=len(batch),
            activation_fn=torch.nn.Identity(),  # a model may name another, and the softmax follows
            apply_softmax=True,
            show_progress_bar=False,
        )
        return [
            Verdict(float(row[self._entails]), float(row[self._contradicts]), self._is_cut(pair))
            for row, pair in zip(probabilities, batch, strict=True)
        ]

    def _is_cut(self, pair: Pair) -> bool:
        ids = self._model.tokenizer(*pair, verbose=False)["input_ids"]
        return len(ids) > self._model.max_seq_length


def label_places(name: str, id2label: dict[int, str]) -> tuple[int, int]:
    """Where in the model's output entailment and contradiction stand.

    Raises:
        UserError: they do not stand there once each, in three classes.
    """
    labels = {place: str(label).lower() for place, label in id2label.items()}
    places = []
    for wanted in WANTED:
        found = [place for place, label in labels.items() if label == wanted]
        if len(found) != 1 or len(labels) != 3:
            raise UserError(
                f"--verifier {name}: its labels are {', '.join(map(repr, id2label.values()))}, and must be "
                f"entailment, contradiction and a third such as neutral; {ADVICE}"
            )
        places.append(int(found[0]))
    return places[0], places[1]
