"""A teacher that a server has: its completions, and its log-probabilities on given tokens.

The prompt is sent as token ids of the teacher's own tokenizer, so chat template and BOS are those of training with
a local teacher. What the server's checkpoint ships of sampling defaults is overruled, and its answer is cut as a
local one is.

A server cannot prove which weights it has. That its tokens are those of `teacher_model` is checked on every answer.

Shapes: C completion tokens, K of the likeliest tokens.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from medistill_trl.errors import UserError
from medistill_trl.losses.chunked import CHUNK_SIZE
from medistill_trl.losses.top_k import TopK
from medistill_trl.model_source import ModelSource
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.teacher import Completion, Sampling, Teacher, cut
from medistill_trl.teacher_server import Asking, TeacherServer

logger = logging.getLogger(__name__)

LARGEST_SEED = 2**63 - 1
HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
SMALLEST_TAIL = 1e-9  # of a float32 sum nothing finer is known
EMPTY_TAIL = -100.0  # see `TopK`


class ServedTeacher(Teacher):
    """A teacher behind a server; it has no `model`, and gives no logits.

    Args:
        server: Serves it.
        source: Of its config; no weights are loaded.
        tokenizer: Its own tokenizer.
        form: Its prompt format.
        end_ids: Tokens that end a completion.
        device: Where log-probabilities are put.
    """

    gives_logits = False

    def __init__(
        self,
        server: TeacherServer,
        source: ModelSource,
        tokenizer: PreTrainedTokenizerBase,
        form: PromptFormat,
        end_ids: Sequence[int],
        device: torch.device,
    ):
        super().__init__(None, tokenizer, form, served_identity(server, source))
        self.server = server
        self.source = source
        self.end_ids = set(end_ids)
        self.device = device
        self._warned: set[str] = set()

    @property
    def writes_with_others(self) -> bool:
        return False

    @property
    def context_length(self) -> int | None:
        return self.source.context_length

    # --- completions -----------------------------------------------------------------------------

    def complete(
        self, prompts: Sequence[str], sampling: Sampling, seed: int = 0
    ) -> list[Completion]:
        """Answer rendered prompts; the seed of each counts on from the first's."""
        seeds = range(seed, seed + len(prompts))
        found = dict(
            entry for part in self.draw(prompts, seeds, sampling, len(prompts)) for entry in part
        )
        return [found[place] for place in range(len(prompts))]

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, batch_size: int
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Completions as they arrive, each prompt with its own seed; `batch_size` means nothing to a server."""

        async def ask(asking: Asking, question: tuple[str, int]) -> Completion:
            return self._read(await asking.completion(self._body(*question, sampling)))

        for part in self.server.each(ask, list(zip(prompts, seeds, strict=True))):
            self.generated_tokens += sum(completion.num_tokens for _, completion in part)
            yield part

    def _body(self, prompt: str, seed: int, sampling: Sampling) -> dict:
        body = {
            "prompt": self.form.encode(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            # Defaults that a checkpoint may ship.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(self.end_ids),
            "return_token_ids": True,
        }
        if self.form.stop_strings:
            body["stop"] = self.form.stop_strings
        if sampling.temperature > 0:
            body["seed"] = seed & LARGEST_SEED
        return body

    def _read(self, choice: dict) -> Completion:
        """A choice of `/v1/completions` as a completion."""
        match choice:
            case {"text": str() as text, "finish_reason": ("stop" | "length") as reason}:
                pass
            case _:
                raise UserError(
                    f"teacher server {self.server.url}: an answer without text or finish_reason "
                    f"({ {key: choice.get(key) for key in ('text', 'finish_reason')} })"
                )
        ids = choice.get("token_ids")
        if ids is None:  # split anew, perhaps otherwise than it was written
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self._check_tokens(ids, text)
        completion = cut(ids, self.end_ids, self.form)
        if reason == "length" or completion.finished:
            return completion
        # It ended at a token, or a text, that it does not return.
        stop = choice.get("stop_reason")
        if isinstance(stop, str) or (
            stop is None and self.form.stop_strings and "token_ids" not in choice
        ):
            return replace(completion, finished=True)
        end_id = self.tokenizer.eos_token_id if stop is None else stop
        return replace(completion, finished=True, end_id=end_id)

    def _check_tokens(self, ids: list[int], text: str) -> None:
        """Refuse what another model must have written."""
        rows = self.source.num_embeddings
        if not all(type(id) is int and 0 <= id < rows for id in ids):
            raise UserError(
                f"teacher server {self.server.url}: {self.server.model!r} writes tokens that {self.source.name} does not "
                "have; teacher_model must be the model it serves"
            )
        own = self.tokenizer.decode(ids, skip_special_tokens=True)
        if HALF_CHARACTER in own + text:  # which decoders show in different ways
            return
        if not _plain(own).startswith(_plain(text)):
            raise UserError(
                f"teacher server {self.server.url}: what {self.server.model!r} wrote as {text[:60]!r} reads "
                f"{own[:60]!r} in the tokens of {self.source.name}; teacher_model must be the model it serves"
            )

    # --- log-probabilities -----------------------------------------------------------------------

    def completion_log_probs(
        self,
        examples: Sequence[dict[str, list[int]]],
        vocab_size: int | None = None,
        batch_size: int | None = None,
        chunk_size: int = CHUNK_SIZE,
    ) -> list[torch.Tensor]:
        """log p_T of every completion token, over the teacher's whole vocabulary.

        Args:
            examples: `input_ids` and `labels` as `encode_example` gives them.
            vocab_size: Where it is smaller than the teacher's, a warning says that the rest is not taken out.
            batch_size, chunk_size: Mean nothing to a server.

        Returns:
            (C,) each, float32, nats.

        Raises:
            UserError: the server gives no log-probabilities of prompts.
        """
        if vocab_size is not None and vocab_size < len(self.tokenizer):
            self._warn_once(
                f"warning: the served teacher's log-probabilities are over its {len(self.tokenizer)} tokens; the "
                f"{len(self.tokenizer) - vocab_size} that the student lacks are not taken out, as they are of a local "
                "teacher"
            )

        async def ask(asking: Asking, example: dict) -> torch.Tensor:
            ids, targets = example["input_ids"], _targets(example)
            if not targets:
                return torch.zeros(0, device=self.device)
            entries = await asking.prompt_log_probs(ids, 1)
            found = [entries[place][ids[place]] for place in targets]
            return torch.tensor(found, dtype=torch.float32, device=self.device)

        return self._in_order(ask, examples)

    def check_log_probs(self) -> None:
        """Nothing to prove: they are the server's."""

    def top_log_probs(
        self, examples: Sequence[dict[str, list[int]]], k: int, vocab_size: int
    ) -> Iterator[list[tuple[int, TopK]]]:
        """The K likeliest tokens at every completion token and the mass of all others, as the answers arrive, each
        with its example's place.

        Only the vocabulary's leading tokens count. Where others are among the likeliest, they are taken out, and as
        many more are asked for; what others have in the tail is not known, and stays there.

        The server must have room for one token more than the longest example, and have been started to give as many
        log-probabilities (vLLM: --max-logprobs).

        Args:
            examples: `input_ids` and `labels` as `encode_example` gives them.
            k: K, at most `vocab_size`.
            vocab_size: Leading tokens the distributions are over.

        Returns:
            Of each example ids and log-probabilities (C, K) and log-tails (C, 1), at temperature 1. A tail is 1 less
            what the K have together, known as finely as a float32 sum is.

        Raises:
            UserError: the server gives no log-probabilities of prompts, or fewer.
        """
        if vocab_size < len(self.tokenizer):
            self._warn_once(
                f"warning: the served teacher's log-probabilities are over its {len(self.tokenizer)} tokens; the "
                f"{len(self.tokenizer) - vocab_size} that the student lacks are taken out where they are among the "
                "likeliest, and count to all others elsewhere"
            )

        async def ask(asking: Asking, example: dict, asked: int = k) -> TopK:
            targets, places = _targets(example), []
            if targets:
                entries = await asking.prompt_log_probs(example["input_ids"], asked)
                places = [_leading(entries[place], asked, vocab_size) for place in targets]
            lacking = k - min(map(len, places), default=k)
            if lacking > 0:
                return await ask(asking, example, asked + lacking)
            return _top_k(places, k, whole=k == vocab_size)

        return self.server.each(ask, examples)

    def _in_order(self, ask, items: Sequence) -> list:
        found = dict(entry for part in self.server.each(ask, items) for entry in part)
        return [found[place] for place in range(len(items))]

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)


def served_identity(server: TeacherServer, source: ModelSource) -> str:
    """Names a served teacher as far as that is known: not its dtype, nor its quantisation."""
    return f"{source.fingerprint} served as {server.model}"


def _targets(example: dict[str, list[int]]) -> list[int]:
    """Places of the tokens that are predicted: the first of a text never is."""
    labels = example["labels"]
    return [place for place in range(1, len(labels)) if labels[place] != IGNORED]


def _leading(place: dict[int, float], asked: int, vocab_size: int) -> list[tuple[int, float]]:
    """Of the tokens that were asked for the leading ones, likeliest first; what the others have is taken out."""
    likeliest = sorted(place.items(), key=lambda entry: -entry[1])[:asked]
    others = math.fsum(math.exp(value) for id, value in likeliest if id >= vocab_size)
    log_rest = math.log(max(SMALLEST_TAIL, 1 - others))
    return [(id, value - log_rest) for id, value in likeliest if id < vocab_size]


def _top_k(places: list[list[tuple[int, float]]], k: int, whole: bool) -> TopK:
    """
    Args:
        whole: They are the whole vocabulary.
    """
    ids = [[id for id, _ in likeliest[:k]] for likeliest in places]
    log_probs = [[value for _, value in likeliest[:k]] for likeliest in places]
    tails = [max(SMALLEST_TAIL, 1 - math.fsum(map(math.exp, values))) for values in log_probs]
    log_tails = [EMPTY_TAIL if whole else math.log(tail) for tail in tails]
    return TopK(
        torch.tensor(ids, dtype=torch.int64).reshape(-1, k),
        torch.tensor(log_probs, dtype=torch.float32).reshape(-1, k),
        torch.tensor(log_tails, dtype=torch.float32)[:, None],
    )


def _plain(text: str) -> str:
    """Without blanks: decoders differ in them."""
    return "".join(text.split())
