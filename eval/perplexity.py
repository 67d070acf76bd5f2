"""Perplexity on MedPPL-10k: how well a model predicts medical prose.

Nats per token and perplexity hold for one tokenizer only; bits per byte compares models whose tokenizers
differ, since the bytes are the text's own.

Every text is read after one opening token: BOS, or EOS for tokenizers without BOS, as lm-eval does. It is
never scored, and every token of the text is, the first one too.

Documents longer than the window are read in strided windows: each begins `stride` tokens after the one
before, and scores the tokens that no window before it did. So each token is scored exactly once, with at
least `window − stride` tokens before it, or all there are.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from eval.batching import BatchSize
from eval.data_files import read_rows
from eval.item_store import ItemStore
from eval.options import Options
from eval.statistics import Estimate, ratio_interval
from eval.subjects import Pair, Subject
from medistill_trl.errors import UserError
from medistill_trl.prompts import IGNORED
from medistill_trl.teacher import completion_log_probs
from medistill_trl.vocabulary import shared_vocabulary

FILES = ["medppl_10k.jsonl"]
COLUMNS = {"text": str}
LONGEST_DEFAULT_WINDOW = 2048
DOCUMENTS_PER_CHUNK = 64  # so many are encoded at a time, and lost if the evaluation is killed


def check(pair: Pair, data: Path, options: Options) -> None:
    """Raises UserError for what would stop `evaluate`: a row without text, a window too wide."""
    read_rows(data / FILES[0], options.limit, COLUMNS)
    check_window(pair, *window_and_stride(pair, options))


def evaluate(pair: Pair, data: Path, options: Options, store: ItemStore) -> dict:
    """Both models on the same documents; see `docs/evaluation.md` for the result's keys."""
    documents = read_rows(data / FILES[0], options.limit, COLUMNS)
    documents = [{"id": row["id"], "text": row["text"]} for row in documents]
    window, stride = window_and_stride(pair, options)
    check_window(pair, window, stride)
    records = {
        subject.name: score(subject, documents, window, stride, options.batch_size, store)
        for subject in pair.subjects
    }
    result = {"documents": len(documents), "window_tokens": window, "stride_tokens": stride}
    result |= {name: summary(rows) for name, rows in records.items()}
    if pair.teacher is not None:
        result["student_minus_teacher"] = difference(pair, records)
    items = [{"subject": name, **row} for name, rows in records.items() for row in rows]
    return {**result, "items": items}


def window_and_stride(pair: Pair, options: Options) -> tuple[int, int]:
    window = options.window or default_window(pair)
    return window, options.stride or max(1, window // 2)


def default_window(pair: Pair) -> int:
    """The same for both models: what both can attend to, up to a limit."""
    limits = [s.context_length for s in pair.subjects if s.context_length is not None]
    return min([LONGEST_DEFAULT_WINDOW, *limits])


def check_window(pair: Pair, window: int, stride: int) -> None:
    """Refuse windows that leave a token without context or that a model cannot attend to."""
    if not 1 <= stride < window:
        raise UserError(
            f"--stride: must be at least 1 and below the window, got {stride} with a window of {window}"
        )
    for subject in pair.subjects:
        limit = subject.context_length
        if limit is not None and window > limit:
            raise UserError(
                f"--window: the {subject.name} {subject.source} attends to {limit} tokens, got {window}"
            )


# --- scoring


def score(
    subject: Subject,
    documents: list[dict],
    window: int,
    stride: int,
    batch_size: int | None,
    store: ItemStore,
) -> list[dict]:
    """One record a document: `id`, `nats` (−Σ log p), `tokens`, `bytes` (of UTF-8)."""
    key = {
        "measure": "perplexity, version 1",
        "subject": subject.fingerprint,
        "window": window,
        "stride": stride,
    }

    batches = BatchSize.of(batch_size, PartialState().device)

    def compute(part: list[dict]) -> Iterator[dict]:
        model = subject.model
        windows = [
            (number, example)
            for number, document in enumerate(part)
            for example in document_windows(
                encode_document(subject.form.tokenizer, document["text"]), window, stride
            )
        ]
        windows.sort(key=lambda pair: -len(pair[1]["input_ids"]))  # batches of like length
        scored = batches.map(
            lambda examples: completion_log_probs(model, examples),
            [example for _, example in windows],
        )
        records = [
            {"nats": 0.0, "tokens": 0, "bytes": len(document["text"].encode())} for document in part
        ]
        for (number, _), log_probs in zip(windows, scored, strict=True):
            records[number]["nats"] -= log_probs.double().sum().item()
            records[number]["tokens"] += len(log_probs)
        return records

    label = f"perplexity of the {subject.name}"
    return store.records(key, documents, compute, DOCUMENTS_PER_CHUNK, label)


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The opening token, then the text's."""
    opening = tokenizer.bos_token_id
    if opening is None:
        opening = tokenizer.eos_token_id
    return [opening, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def document_windows(ids: list[int], window: int, stride: int) -> Iterator[dict[str, list[int]]]:
    """Examples as `encode_example` gives them; labels are set on the tokens a window scores.

    Args:
        ids: With the opening token, which is scored nowhere.
        window: Tokens of an example, at most.
        stride: Tokens from one window's begin to the next one's; below `window`.
    """
    start, scored = 0, 1
    while scored < len(ids):
        end = min(start + window, len(ids))
        labels = [IGNORED] * (scored - start) + ids[scored:end]
        yield {"input_ids": ids[start:end], "labels": labels}
        start, scored = start + stride, end


# --- summaries


def summary(records: list[dict]) -> dict:
    """The corpus's numbers; intervals are of the ratio of sums, with documents as clusters."""
    nats = [row["nats"] for row in records]
    tokens = [row["tokens"] for row in records]
    num_bytes = [row["bytes"] for row in records]
    nats_per_token = ratio_interval(nats, tokens)
    bits = [value / math.log(2) for value in nats]
    return {
        "tokens": sum(tokens),
        "bytes": sum(num_bytes),
        "perplexity": exponential(nats_per_token).to_dict(),
        "nats_per_token": nats_per_token.to_dict(),
        "bits_per_byte": ratio_interval(bits, num_bytes).to_dict(),
    }


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate and of its interval's ends."""
    interval = estimate.interval and tuple(map(math.exp, estimate.interval))
    value = None if estimate.value is None else math.exp(estimate.value)
    return Estimate(value, interval, estimate.n, estimate.clusters, estimate.note)


def difference(pair: Pair, records: dict[str, list[dict]]) -> dict:
    """Student − teacher on the same documents, which are the clusters here too."""
    rows = list(zip(records["student"], records["teacher"], strict=True))
    nats = [student["nats"] - teacher["nats"] for student, teacher in rows]
    bits = [value / math.log(2) for value in nats]
    num_bytes = [teacher["bytes"] for _, teacher in rows]
    result = {"bits_per_byte": ratio_interval(bits, num_bytes).to_dict()}
    if shared_vocabulary(pair.student.form.tokenizer, pair.teacher.form.tokenizer) is None:
        why = "the tokenizers differ: a token is not the same piece of text for both models"
        return result | {"nats_per_token": {"skipped": why}}
    tokens = [teacher["tokens"] for _, teacher in rows]
    return result | {"nats_per_token": ratio_interval(nats, tokens).to_dict()}
