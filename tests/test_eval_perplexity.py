"""Perplexity: against the plain formula, one document at a time, and texts of known perplexity."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, make_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_subjects import CONTEXT, tiny_pair, tiny_subject, tiny_tokenizer, write_rows

from eval import perplexity
from eval.item_store import ItemStore
from eval.options import Options
from eval.perplexity import document_windows, encode_document, summary
from eval.subjects import Pair
from medistill_trl.errors import UserError
from medistill_trl.prompts import IGNORED

SAMPLE = [
    json.loads(line)
    for line in (ROOT / "data_prep/sample/raw/passages/passages.jsonl").read_text().splitlines()
]
TEXTS = [row["text"] for row in SAMPLE[:4]] + ["Ear.", "α-Thalassaemia – 5 µg"]


@pytest.fixture
def data(tmp_path):
    rows = [{"id": f"d{n}", "source": "sample", "text": text} for n, text in enumerate(TEXTS)]
    write_rows(tmp_path / "data/medppl_10k.jsonl", rows)
    return tmp_path / "data"


@pytest.fixture
def measure(data, tmp_path):
    """The part's result on the data; results are stored afresh for each call unless told otherwise."""
    calls = iter(range(100))

    def run(pair: Pair, store: ItemStore | None = None, **options) -> dict:
        store = store or ItemStore(tmp_path / f"store{next(calls)}")
        return perplexity.evaluate(pair, data, Options(**options), store)

    return run


# --- windows


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 5, 2), (30, 7, 3), (30, 7, 6), (9, 9, 1)]
)
def test_every_token_is_scored_once_with_enough_before_it(length, window, stride):
    ids = list(range(length))
    seen = {}
    for example in document_windows(ids, window, stride):
        assert len(example["input_ids"]) <= window
        assert len(example["labels"]) == len(example["input_ids"])
        start = example["input_ids"][0]
        for label in example["labels"]:
            if label != IGNORED:
                assert label not in seen
                seen[label] = label - start
    assert sorted(seen) == ids[1:]
    assert all(before >= min(token, window - stride) for token, before in seen.items())


def test_the_opening_token():
    tokenizer = tiny_tokenizer()
    ids = encode_document(tokenizer, "Ear.")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "Ear."
    tokenizer.bos_token = None
    assert encode_document(tokenizer, "Ear.") == [tokenizer.eos_token_id, *ids[1:]]


# --- numbers


@torch.no_grad()
def plain(subject, text: str, window: int, stride: int) -> float:
    """−Σ log p of a document's tokens, token by token, each with the context its window gives."""
    tokenizer = subject.form.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats, logits = 0.0, {}
    for place in range(1, len(ids)):
        # The first window that reaches this token; each begins `stride` after the one before.
        begin = stride * max(0, math.ceil((place + 1 - window) / stride))
        if begin not in logits:
            logits[begin] = subject.model(torch.tensor([ids[begin : begin + window]])).logits[0]
        log_probs = logits[begin][place - 1 - begin].double().log_softmax(-1)
        nats -= log_probs[ids[place]].item()
    return nats


@pytest.mark.parametrize(("window", "stride"), [(CONTEXT, 256), (40, 13)])
def test_it_is_the_plain_formula_document_by_document(measure, window, stride):
    pair = tiny_pair()
    result = measure(pair, window=window, stride=stride)
    for subject in pair.subjects:
        nats = [plain(subject, text, window, stride) for text in TEXTS]
        records = [row for row in result["items"] if row["subject"] == subject.name]
        assert [row["nats"] for row in records] == pytest.approx(nats, rel=1e-5)
        tokens = sum(
            len(subject.form.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS
        )
        num_bytes = len("".join(TEXTS).encode())
        found = result[subject.name]
        assert (found["tokens"], found["bytes"]) == (tokens, num_bytes)
        assert found["nats_per_token"]["value"] == pytest.approx(sum(nats) / tokens, rel=1e-5)
        assert found["perplexity"]["value"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-5)
        bits = sum(nats) / math.log(2)
        assert found["bits_per_byte"]["value"] == pytest.approx(bits / num_bytes, rel=1e-5)
    gap = result["student_minus_teacher"]["bits_per_byte"]["value"]
    values = [result[name]["bits_per_byte"]["value"] for name in ("student", "teacher")]
    assert gap == pytest.approx(values[0] - values[1], rel=1e-6)


def test_it_is_lm_evals_rolling_likelihood(measure):
    pair = tiny_pair()
    records = [row for row in measure(pair)["items"] if row["subject"] == "student"]
    theirs = HFLM(
        pretrained=pair.student.model, tokenizer=pair.student.form.tokenizer, batch_size=1
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    nats = [-value for value in theirs.loglikelihood_rolling(requests, disable_tqdm=True)]
    assert [row["nats"] for row in records] == pytest.approx(nats, rel=1e-5)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(measure):
    tokenizer = tiny_tokenizer()
    model = make_model(len(tokenizer))
    model.get_output_embeddings().weight.data.zero_()
    pair = Pair(tiny_subject("student", tokenizer, model, "uniform"), None, None)
    result = measure(pair, window=40)
    assert result["student"]["perplexity"]["value"] == pytest.approx(len(tokenizer), rel=1e-5)
    low, high = result["student"]["perplexity"]["interval_95"]
    assert low == pytest.approx(high, rel=1e-5)  # no document differs from another
    assert "student_minus_teacher" not in result


def test_batches_do_not_matter(measure):
    one, eight = (measure(tiny_pair(), window=40, batch_size=size) for size in (1, 8))
    for a, b in zip(one["items"], eight["items"], strict=True):
        assert a["nats"] == pytest.approx(b["nats"], rel=1e-5)
        assert (a["id"], a["tokens"], a["bytes"]) == (b["id"], b["tokens"], b["bytes"])


def test_a_model_against_itself(measure):
    result = measure(tiny_pair(student_seed=None))
    for name in ("bits_per_byte", "nats_per_token"):
        assert result["student_minus_teacher"][name]["value"] == 0
        assert result["student_minus_teacher"][name]["interval_95"] == [0, 0]


def test_other_tokenizers_share_bytes_not_tokens(measure):
    small, large = tiny_tokenizer(vocab_size=450), tiny_tokenizer()
    pair = Pair(
        tiny_subject("student", small, make_model(len(small), seed=3), "small"),
        tiny_subject("teacher", large, make_model(len(large), seed=4), "large"),
        None,
    )
    result = measure(pair)
    assert result["student"]["bytes"] == result["teacher"]["bytes"]
    assert result["student"]["tokens"] > result["teacher"]["tokens"]
    assert "tokenizers differ" in result["student_minus_teacher"]["nats_per_token"]["skipped"]
    assert result["student_minus_teacher"]["bits_per_byte"]["value"] is not None


def test_the_interval_takes_documents_as_clusters():
    """Two documents of 10 tokens at 1 and 3 nats a token: the ratio is 2, and linearised both are 10 off."""
    rows = [{"nats": 10.0, "tokens": 10, "bytes": 40}, {"nats": 30.0, "tokens": 10, "bytes": 40}]
    found = summary(rows)
    half = 12.7062 * math.sqrt(2 * (10**2 + 10**2)) / 20  # Student's t at one degree of freedom
    assert found["nats_per_token"]["interval_95"] == pytest.approx([2 - half, 2 + half], rel=1e-4)
    assert found["perplexity"]["interval_95"][0] == pytest.approx(math.exp(2 - half), rel=1e-3)


# --- the suite's habits


def test_a_teacher_whose_results_are_stored_is_not_loaded(measure, tmp_path):
    store = ItemStore(tmp_path / "kept")
    first = measure(tiny_pair(), store)

    def refuse():
        raise AssertionError("loaded")

    pair = tiny_pair()
    again = [replace(subject, load=refuse) for subject in pair.subjects]
    assert measure(Pair(*again, pair.recipe), store) == first
    assert store.reused == 2 * len(TEXTS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 64, "stride": 64}, "--stride: must be at least 1 and below the window, got 64"),
        ({"window": CONTEXT + 1}, "--window: the student .* attends to 512 tokens, got 513"),
    ],
)
def test_windows_that_cannot_work(measure, options, said):
    with pytest.raises(UserError, match=said):
        measure(tiny_pair(), **options)
