"""MedQA and MedMCQA: what their rows become in any schema, and which are named or dropped."""

import json

import pytest
from dataset_rows import (
    OPTIONS,
    QUESTION,
    cops,
    key_value,
    medmcqa,
    medqa,
    medqa_hf,
    normalise,
    read,
    without,
    write,
)
from datasets import Dataset

from data_prep import inputs
from data_prep.benchmarks import benchmark_row
from data_prep.sources import BENCHMARK
from data_prep.sources.rows import BadRow, Dropped
from medistill_trl.errors import UserError

# MedQA

HUB_AND_RELEASE = medqa(), without(medqa(), "meta_info", "metamap_phrases")
BIGBIO = medqa(options=key_value(OPTIONS)), medqa(options=key_value(OPTIONS)[::-1])


@pytest.mark.parametrize("row", [*HUB_AND_RELEASE, *BIGBIO, medqa_hf()])
def test_medqa_in_each_of_its_schemas(row):
    record = normalise("medqa", row, "test")
    assert (record.question, record.options) == (QUESTION, tuple(OPTIONS.values()))
    assert (record.answer, record.split, record.subject) == (2, "test", None)


def test_medqa_hf_puts_its_two_sentences_together():
    row = medqa_hf(sent1="A girl has a goitre.", sent2="What does she lack?")
    assert normalise("medqa", row).question == "A girl has a goitre. What does she lack?"
    assert normalise("medqa", medqa_hf(sent2=None)).question == QUESTION
    assert normalise("medqa", row).native_id == "d-1"


@pytest.mark.parametrize("listed", [dict, key_value])
def test_medqa_with_five_options_is_for_training_only(listed):
    row = medqa(options=listed(OPTIONS | {"E": "Lead"}))
    assert normalise("medqa", row, "train").options == (*OPTIONS.values(), "Lead")
    for split in ("validation", "test"):
        with pytest.raises(Dropped, match="5 options: the benchmark is the four-option release"):
            normalise("medqa", row, split)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('Copper\n"', "Copper"),
        ('""Zinc"" is first', '""Zinc"" is first'),
        ('"""Take zinc."""', '"Take zinc."'),
        ('"Call it ""zinc"", then."', 'Call it "zinc", then.'),
        ('"Zinc"', '"Zinc"'),
        ("  Copper ", "Copper"),
    ],
)
def test_medqa_options_lose_what_a_spreadsheet_left(written, meant):
    row = medqa(options=OPTIONS | {"D": written}, answer=written, answer_idx="D")
    record = normalise("medqa", row)
    assert record.options[3] == meant
    # The answer's own text may be clean where the option's is not.
    assert normalise("medqa", row | {"answer": meant}).answer == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (medqa(answer="Zinc"), "answer is not the text of option C, which answer_idx names"),
        (medqa(answer=["Iodine"]), "named by answer must be a text, got list"),
        (medqa(answer_idx="E"), "answer_idx is 'E', not one of A, B, C, D"),
        (medqa(answer_idx=2), "answer_idx must be a text, got int"),
        (without(medqa(), "answer_idx"), "label must be a whole number, got None"),
        (medqa(options="Iron, zinc"), "options must be texts by letter, got str"),
        (medqa(options=[]), "options must be texts by letter, got dict"),
        (medqa(options=["Iron", "Zinc"]), "options must be texts by letter, or a list of key"),
        (medqa(options=[{"key": ["A"], "value": "Iron"}]), "or a list of key and value"),
        (medqa(options=OPTIONS | {"B": 5}), "option B must be a text, got int"),
        (medqa(options=OPTIONS | {"B": "a\0"}), "option B contains a NUL byte"),
        (medqa_hf(label=4), "label is 4, outside 0 to 3"),
        (medqa_hf(label=-1), "label is -1, outside 0 to 3"),
        (medqa_hf(label="2"), "label must be a whole number, got '2'"),
        (medqa_hf(label=True), "label must be a whole number, got True"),
        (without(medqa_hf(), "ending2"), "option C must be a text, got NoneType"),
    ],
)
def test_medqa_bad_rows(row, reason):
    with pytest.raises(BadRow, match=reason):
        normalise("medqa", row)


def test_medqa_without_the_text_of_the_answer():
    assert normalise("medqa", without(medqa(), "answer")).answer == 2


def test_medqa_with_an_empty_option_is_dropped_by_name():
    with pytest.raises(Dropped, match="has an empty option"):
        normalise("medqa", medqa(options=OPTIONS | {"A": " "}))


# MedMCQA


def counts_from(folder, **files):
    write(folder / "medmcqa", **files)
    data = inputs.find("medmcqa", folder)
    return data.source.survey(data.folder, data.files)


@pytest.mark.parametrize(
    ("files", "first"),
    [
        ({"train": cops(1, 2, 3, 4)}, {"train": 1}),
        ({"train": cops(0, 1, 2, 3)}, {"train": 0}),
        ({"train": cops(4, 1, 2), "dev": cops(2)}, {"train": 1, "validation": 1}),
        ({"train": cops(2), "dev": cops(0, 1)}, {"train": 0, "validation": 0}),
        ({"train": cops(4, 2), "dev": cops(0, 1)}, {"train": 1, "validation": 0}),
        ({"train": cops(0, 1, 2), "test": cops(-1, -1, 4, 4)}, {"train": 0}),
        ({"train": cops(*[4] * 30, 0)}, {"train": 1}),
        ({"train": cops(*[0] * 30, 4)}, {"train": 0}),
        ({"train": ['{"cop":4}', '{"cop" : 4, "broken', '{"cop": 1}']}, {"train": 1}),
        ({"train": [json.dumps({"question": "cop 0", "cop": 4})]}, {"train": 1}),
        ({"test": cops(-1, -1)}, {}),
    ],
)
def test_medmcqa_what_cop_counts_from_is_told_by_each_split(tmp_path, files, first):
    assert counts_from(tmp_path, **files) == first


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train": cops(1, 2, 3)}, "train: .*0 in 0 rows and 4 in 0 of 3"),
        ({"train": cops(0, 4)}, "train: .*0 in 1 rows and 4 in 1 of 2"),
        ({"train": cops(0, 0, 4)}, "train: .*0 in 2 rows and 4 in 1 of 3"),
        # A hub file that lost its zeros, beside a release's: small ones are believed, this one not.
        ({"train": cops(4, 1), "dev": cops(*[1, 2, 3] * 4)}, "validation: .*4 in 0 of 12"),
    ],
)
def test_medmcqa_undecidable(tmp_path, files, said):
    with pytest.raises(UserError, match=rf"medmcqa, {said}"):
        counts_from(tmp_path, **files)


def test_medmcqa_counts_from_0_in_parquet(tmp_path):
    folder = tmp_path / "medmcqa"
    folder.mkdir()
    Dataset.from_list(cops(0, 3)).to_parquet(folder / "train-0.parquet")
    assert counts_from(tmp_path) == {"train": 0}


@pytest.mark.parametrize(("first", "cop"), [(1, 3), (0, 2)])
def test_medmcqa_in_both_schemas(first, cop):
    record = normalise("medmcqa", medmcqa(cop=cop), facts={"train": first})
    assert record.options == ("Iron", "Zinc", "Iodine", "Copper")
    assert record.options[record.answer] == "Iodine"
    assert (record.native_id, record.subject) == ("5a9b-11", "Medicine")
    assert record.explanation == "The thyroid needs iodine."


@pytest.mark.parametrize(
    ("first", "cop", "reason"),
    [
        (1, 0, "cop is 0, outside 1 to 4"),
        (1, 5, "cop is 5, outside 1 to 4"),
        (0, 4, "cop is 4, outside 0 to 3"),
        (0, -1, "cop is -1, outside 0 to 3"),
        (1, "3", "cop must be a whole number, got '3'"),
        (1, 3.0, "cop must be a whole number, got 3.0"),
        (1, True, "cop must be a whole number, got True"),
        (1, None, "has no cop"),
    ],
)
def test_medmcqa_cop_out_of_range(first, cop, reason):
    with pytest.raises(BadRow, match=reason):
        normalise("medmcqa", medmcqa(cop=cop), facts={"train": first})


@pytest.mark.parametrize("row", [medmcqa(cop=-1), medmcqa(cop=None), without(medmcqa(), "cop")])
def test_medmcqa_test_split_is_dropped_by_name(row):
    with pytest.raises(Dropped, match="the test split's answers were never published"):
        normalise("medmcqa", row, "test")


def test_medmcqa_multi_has_one_answer_like_any_other():
    assert normalise("medmcqa", medmcqa(choice_type="multi")).answer == 2


def test_medmcqa_without_explanation_subject_or_id():
    bare = without(medmcqa(exp=None), "subject_name", "id", "topic_name")
    record = normalise("medmcqa", bare)
    assert (record.explanation, record.subject) == ("", None)
    assert normalise("medmcqa", medmcqa(subject_name=" ")).subject is None


def test_medmcqa_option_that_is_a_number_keeps_its_figures():
    record = normalise("medmcqa", medmcqa(opa=10, opb="20", opc=2.5, opd=0))
    assert record.options == ("10", "20", "2.5", "0")


@pytest.mark.parametrize(
    ("option", "error", "reason"),
    [
        ("", Dropped, "has an empty option"),
        ("  ", Dropped, "has an empty option"),
        (None, BadRow, "opb must be a text, got NoneType"),
        (True, BadRow, "opb must be a text, got bool"),
        (["Zinc"], BadRow, "opb must be a text, got list"),
    ],
)
def test_medmcqa_option_that_is_none(option, error, reason):
    with pytest.raises(error, match=reason):
        normalise("medmcqa", medmcqa(opb=option))


def test_medmcqa_repeated_options_are_marked_in_the_benchmark():
    twice = benchmark_row(normalise("medmcqa", medmcqa(opb="Iodine"), "validation"))
    assert twice["repeated_options"] is True
    assert (twice["options"].count("Iodine"), twice["answer"]) == (2, 2)
    once = benchmark_row(normalise("medmcqa", medmcqa(), "validation"))
    assert "repeated_options" not in once


def test_medmcqa_a_repeated_question_under_another_id_is_two_records(tmp_path):
    part, ledger = read(tmp_path, "medmcqa", dev=[*cops(3, 4), medmcqa(id="again", cop=3)])
    assert len(part.rows(BENCHMARK)) == 3
    assert ledger.bad_rows == []
