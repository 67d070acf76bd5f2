"""PubMedQA, PubHealth and passages: what their rows become, and which are named or dropped."""

import pytest
from dataset_rows import (
    normalise,
    pubhealth,
    pubmedqa,
    pubmedqa_hub,
    read,
    without,
)
from datasets import ClassLabel, Dataset, Features, Value

from data_prep import inputs, parts
from data_prep.ledger import Ledger
from data_prep.sources import BENCHMARK, PASSAGES, POOL, RESERVE, load
from data_prep.sources.rows import BadRow, Dropped
from data_prep.workspace import Workspace
from medistill_trl.errors import UserError

# PubMedQA


@pytest.mark.parametrize("row", [pubmedqa(), pubmedqa_hub()])
def test_pubmedqa_in_both_schemas(row):
    record = normalise("pubmedqa", row, "artificial")
    assert record.question == "Does iodised salt prevent goitre?"
    assert (record.options, record.answer) == (("yes", "no", "maybe"), 0)
    assert (record.context, record.explanation) == (("A.", "B."), "It does.")
    assert record.pmid == record.native_id == "101"


@pytest.mark.parametrize("key", ["CONTEXTS", "context"])
@pytest.mark.parametrize(
    ("value", "passages"),
    [
        ("['A.', \"It's B.\"]", ("A.", "It's B.")),
        ("A passage.", ("A passage.",)),
        (["A.", " ", "B. "], ("A.", "B.")),
    ],
)
def test_pubmedqa_contexts_that_are_text(key, value, passages):
    row = without(pubmedqa(), "CONTEXTS") | {key: value}
    assert normalise("pubmedqa", row).context == passages


@pytest.mark.parametrize(
    ("contexts", "reason"),
    [
        ("['A.', ", "text of a list that cannot be read"),
        ("[open('x')]", "text of a list that cannot be read"),
        ("[1, 2]", "a context must be a text, got int"),
        ("['A.'], 'B.'", "contexts must be a list of texts, got tuple"),
        ([], "contexts must be a list of texts, got list"),
        ({"a": "A."}, "contexts must be a list of texts, got dict"),
        (["A.", None], "a context must be a text, got NoneType"),
        (None, "contexts must be a list of texts, got NoneType"),
    ],
)
def test_pubmedqa_bad_contexts(contexts, reason):
    with pytest.raises(BadRow, match=reason):
        normalise("pubmedqa", pubmedqa(CONTEXTS=contexts))


@pytest.mark.parametrize(("decision", "answer"), [("yes", 0), ("no", 1), ("maybe", 2), (" No ", 1)])
def test_pubmedqa_decisions(decision, answer):
    assert normalise("pubmedqa", pubmedqa(final_decision=decision)).answer == answer


@pytest.mark.parametrize(
    ("decision", "reason"),
    [
        ("perhaps", "final_decision is 'perhaps', not one of yes, no, maybe"),
        ("", "final_decision is empty"),
        (None, "final_decision is empty"),
        (["y", "e", "s"], "final_decision must be a text, got list"),
    ],
)
def test_pubmedqa_bad_decisions(decision, reason):
    row = pubmedqa(final_decision=decision)
    for split in ("artificial", "labelled", "test"):
        with pytest.raises(BadRow, match=reason):
            normalise("pubmedqa", row, split)
    assert normalise("pubmedqa", row, "unlabelled").answer == -1


def test_pubmedqa_unlabelled_needs_no_decision():
    record = normalise("pubmedqa", without(pubmedqa(), "final_decision"), "unlabelled")
    assert (record.split, record.answer, record.context) == ("unlabelled", -1, ("A.", "B."))


@pytest.mark.parametrize(
    "row", [pubmedqa(pubid=None), pubmedqa(pubid=" "), without(pubmedqa(), "pubid")]
)
def test_pubmedqa_without_a_pmid(row):
    with pytest.raises(BadRow, match="has no pubid"):
        normalise("pubmedqa", row)
    assert normalise("pubmedqa", row | {"pmid": 101}).pmid == "101"


def official_test(folder):
    folder.mkdir(exist_ok=True)
    return load("pubmedqa").survey(folder, [])


def test_pubmedqa_official_test_set_as_packaged(tmp_path):
    pmids = official_test(tmp_path)
    assert len(pmids) == 500
    assert all(pmid.isdigit() for pmid in pmids)
    inside, outside = min(pmids), "101"
    for row in (pubmedqa, pubmedqa_hub):
        splits = [
            normalise("pubmedqa", row(pubid=pmid), split, pmids).split
            for pmid, split in [
                (inside, "labelled"),
                (int(inside), "labelled"),
                (outside, "labelled"),
                (outside, "test"),
                (inside, "unlabelled"),
                (inside, "artificial"),
            ]
        ]
        assert splits == ["test", "test", "labelled", "test", "unlabelled", "artificial"]


def test_pubmedqa_ground_truth_of_the_folder_comes_first(tmp_path):
    (tmp_path / "pqal").mkdir()
    (tmp_path / "pqal/test_ground_truth.json").write_text('{"101": "yes", "102": "no"}')
    assert official_test(tmp_path) == {"101", "102"}


@pytest.mark.parametrize("content", ['["101"]', "[101]", '"101"', "101", '{"101": ', "null"])
def test_pubmedqa_ground_truth_that_is_no_object(tmp_path, content):
    (tmp_path / "test_ground_truth.json").write_text(content)
    with pytest.raises(UserError, match=r"test_ground_truth\.json: must be a JSON object keyed by"):
        official_test(tmp_path)


def test_pubmedqa_splits_have_their_roles(tmp_path):
    pmids = sorted(official_test(tmp_path))[:2]
    labelled = [pubmedqa_hub(pubid=int(pmid)) for pmid in (*pmids, 7, 8, 9)]
    part, ledger = read(
        tmp_path,
        "pubmedqa",
        pqa_labeled=labelled,
        pqa_artificial=[pubmedqa_hub(pubid=10)],
        pqa_unlabeled=[without(pubmedqa_hub(pubid=11), "final_decision")],
    )
    found = {
        role: sorted(part.record(row).native_id for row in part.rows(role))
        for role in (BENCHMARK, RESERVE, POOL, PASSAGES)
    }
    assert found == {
        BENCHMARK: sorted(pmids),
        RESERVE: ["7", "8", "9"],
        POOL: ["10"],
        PASSAGES: ["11"],
    }
    assert ledger.notes == []


# PubHealth


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("true", "true"),
        (" Mixture ", "mixture"),
        ("FALSE", "false"),
        ("unproven", "unproven"),
        (0, "false"),
        (1, "mixture"),
        (2, "true"),
        (3, "unproven"),
    ],
)
def test_pubhealth_labels_by_name_or_in_the_order_of_the_hub(label, name):
    record = normalise("pubhealth", pubhealth(label=label))
    assert record.options == ("true", "false", "mixture", "unproven")
    assert record.options[record.answer] == name


@pytest.mark.parametrize("label", [None, "", -1, "-1"])
def test_pubhealth_without_a_label_is_dropped_by_name(label):
    with pytest.raises(Dropped, match="has no label"):
        normalise("pubhealth", pubhealth(label=label))
    with pytest.raises(Dropped, match="has no label"):
        normalise("pubhealth", without(pubhealth(), "label"))


@pytest.mark.parametrize("label", ["Reuters Health", "snopes", "2014-05-01", " "])
def test_pubhealth_slipped_columns_are_dropped_by_name(label):
    with pytest.raises(Dropped, match="its label is none of true, false, mixture, unproven"):
        normalise("pubhealth", pubhealth(label=label))


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (4, "label is 4, outside 0 to 3"),
        (-2, "label is -2, outside 0 to 3"),
        (True, "label must be a name, got bool"),
        (2.0, "label must be a name, got float"),
        (["true"], "label must be a name, got list"),
    ],
)
def test_pubhealth_bad_labels(label, reason):
    with pytest.raises(BadRow, match=reason):
        normalise("pubhealth", pubhealth(label=label))


def test_pubhealth_fields():
    record = normalise("pubhealth", pubhealth(main_text=None))
    assert (record.context, record.explanation, record.subject) == (
        (),
        "Programmes ended it.",
        "Nutrition",
    )
    assert normalise("pubhealth", pubhealth()).context == ("Salt was iodised.",)
    assert normalise("pubhealth", pubhealth(claim_id=17)).native_id == "17"


@pytest.mark.parametrize(
    "names", [["false", "mixture", "true", "unproven"], ["true", "false", "unproven", "mixture"]]
)
def test_pubhealth_parquet_labels_go_by_name_in_any_order(tmp_path, names):
    folder = tmp_path / "raw/pubhealth"
    folder.mkdir(parents=True)
    features = Features({key: Value("string") for key in without(pubhealth(), "label")})
    features["label"] = ClassLabel(names=names)
    rows = [pubhealth(claim_id=name, claim=f"It is {name}.", label=name) for name in names]
    rows.append(pubhealth(claim_id="none", label=-1))
    Dataset.from_list(rows, features).to_parquet(folder / "train.parquet")
    part, ledger = read(tmp_path, "pubhealth")
    records = [part.record(row) for row in range(len(names))]
    assert [r.options[r.answer] for r in records] == [r.native_id for r in records] == names
    assert part.account.fates[4] == "dropped: has no label"
    assert ledger.bad_rows == []


def test_pubhealth_release_with_row_numbers_and_quotation_marks(tmp_path):
    folder = tmp_path / "raw/pubhealth"
    folder.mkdir(parents=True)
    header = "claim_id\tclaim\texplanation\tmain_text\tlabel\n"
    (folder / "test.tsv").write_text(header + '0\t17\t"Salt" is safe.\tWhy\tText "so\tmixture\n')
    (folder / "train.tsv").write_text(
        header + "18\tSalt cures.\tWhy\tText\tfalse\n" + "19\tSalt\tslipped\tWhy\tText\ttrue\n"
    )
    part, ledger = read(tmp_path, "pubhealth")
    test = part.record(part.rows(BENCHMARK)[0])
    assert (test.native_id, test.question, test.context) == ("17", '"Salt" is safe.', ('Text "so',))
    assert len(part.rows(POOL)) == 1
    assert part.account.fates[2] == "dropped: has more or fewer fields than the header"
    assert ledger.bad_rows == []


# Passages


def test_passages_of_any_origin():
    rows = [{"text": " One. "}, {"text": "One.", "id": "a-1"}, {"text": "One.", "pmid": 7}]
    one, two, three = (load("passages").normalise(row, "passages", None) for row in rows)
    assert one.context == two.context == three.context == ("One.",)
    assert two.native_id == f"a-1-{one.native_id}"
    assert (two.pmid, three.pmid) == (None, "7")
    other = load("passages").normalise({"text": "Two.", "id": "a-1"}, "passages", None)
    assert other.native_id != two.native_id


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": "a"}, "has no text"),
        ({"text": " "}, "text is empty"),
        ({"text": 5}, "text must be a text, got int"),
        ({"text": "One.", "id": ["a"]}, "id must be a text or a number, got list"),
    ],
)
def test_passages_bad_rows(row, reason):
    with pytest.raises(BadRow, match=reason):
        load("passages").normalise(row, "passages", None)


def test_passages_of_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    (tmp_path / "b.txt").write_text("\n")
    ledger = Ledger()
    part = parts.read(Workspace(tmp_path / "work", "key", 1), inputs.passages(tmp_path), 0, ledger)
    assert [part.record(row).context for row in part.rows(PASSAGES)] == [("One.\n\nTwo.",)]
    assert [bad.split("/")[-1] for bad in ledger.bad_rows] == ["b.txt, its text: text is empty"]
