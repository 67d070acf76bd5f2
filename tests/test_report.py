"""report.html of one run: what it says, that it is whole, and that nothing a model wrote can run in it."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from report_runs import (
    ATTACK,
    PNG,
    write_attacking_run,
    write_evaluation,
    write_json,
    write_lines,
    write_run,
)
from sealed import read, seal

from eval.report import write_report
from eval.report.__main__ import main
from eval.report.evaluation import sections
from eval.report.items import browser, outcome, read_items
from eval.report.recipe_diff import differences
from eval.report.tables import CHANGE, PERCENT, POINTS, Form
from eval.report.verdict import of_evaluation
from eval.statistics import wilson
from medistill_trl.errors import UserError
from medistill_trl.run_directory import RunDirectory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_attacking_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "results/report.html").read_text()


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_data(self, data):
        if self.cdata_elem is not None:
            self.texts[self.cdata_elem][-1] += data


def text_of(page: str) -> str:
    """What a reader sees, without the items."""
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))  # \\s takes no-break spaces too


def items_of(page: str) -> dict:
    data = re.search(r'<script type="application/json" id="items-data">(.*?)</script>', page, re.S)
    return json.loads(data[1])


# --- the page is whole and safe --------------------------------------------------------------------


def test_nothing_is_loaded_and_only_the_own_style_and_script_may_run(page):
    elements = Elements(page)
    (policy,) = [
        attributes["content"]
        for tag, attributes in elements.found
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for kind, text in (
        ("style", elements.texts["style"][0]),
        ("script", elements.texts["script"][-1]),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    for tag, attributes in elements.found:
        assert tag not in {"link", "iframe", "object", "base", "form"}
        for name, value in attributes.items():
            assert name != "style"
            assert not name.startswith("on")
            if name in {"src", "href"}:
                assert value.startswith(("data:image/png;base64,", "#")), value


def test_what_a_model_wrote_is_data_and_cannot_end_its_element(page):
    assert "window.ran" in page
    assert "<script>window" not in page
    assert "<img src=x" not in page
    assert len(Elements(page).texts["script"]) == 2
    answers = [
        item["answers"]["student"].get("text")
        for found in items_of(page)["sets"]
        for item in found["items"]
    ]
    assert answers.count(ATTACK) == 2


def test_what_a_recipe_says_is_text_too(tmp_path):
    markup = "<img src=x onerror='window.ran=5'>"
    page = write_report(
        write_run(tmp_path / "sft_a", flags=["--system_prompt", markup])
    ).read_text()
    assert page.count("&lt;img src=x onerror=") == 2  # the difference and the whole recipe
    assert "<img src=x" not in page


def test_the_same_folder_gives_the_same_page(folder, page, capsys):
    assert main([str(folder)]) == 0
    assert str(folder / "results/report.html") in capsys.readouterr().out
    assert (folder / "results/report.html").read_text() == page


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "neither results/run.json nor" in message
    with pytest.raises(UserError):
        write_report(tmp_path / "nowhere")


# --- before and after training ---------------------------------------------------------------------


def test_the_page_shows_the_verdict_and_both_sides(page):
    text = text_of(page)
    assert "Closer to its teacher than before training" in text
    assert "For research, not for care." in text
    assert re.search(r"KL\(T‖S\), nats per token the verdict rests on this 4\.12 2\.05 −2\.08 \[−2\.\d\d, −1\.\d\d\]", text)  # fmt: skip


def test_a_run_that_is_not_evaluated_says_how_to(tmp_path):
    run = write_run(tmp_path / "sft_a")
    text = text_of(write_report(run).read_text())
    assert "python -m eval.run" in text
    assert "Benchmarks, by likelihood" not in text


@pytest.mark.parametrize("again", ["run.json", "comprehensive_evaluation.json", None])
def test_pictures_are_of_the_results_that_the_page_shows(tmp_path, again):
    """A comparison of the run has drawn them; after another training or evaluation they are of something else."""
    run = write_run(tmp_path / "sft_a")
    write_evaluation(run, tmp_path / "data", {"medqa": (0.6, 0.5)}, items=40)
    results = run / "results"
    for name in ("fidelity_metrics.png", "pareto.png", "benchmark_comparison.png"):
        (results / name).write_bytes(PNG)
    compared = {"pictures": ["benchmark_comparison.png", "fidelity_metrics.png"]}
    compared["configurations"] = [{"results": [RunDirectory(run).digests()]}]
    write_json(results / "comparison.json", compared)
    if again is not None:
        content = read(results / again)
        content["device"] = "another"
        write_json(results / again, content)
    pictures = write_report(run).read_text().count("data:image/png")
    assert pictures == (3 if again is None else 1)  # its own curves in any case
    compared["configurations"] *= 2  # of this run among others
    write_json(results / "comparison.json", compared)
    assert write_report(run).read_text().count("data:image/png") == 1


# --- the evaluation --------------------------------------------------------------------------------


def test_sentences_say_what_the_tests_bear(folder):
    content = json.loads((folder / "results/comprehensive_evaluation.json").read_text())
    primary, floors = (said.replace("\u00a0", " ") for said in of_evaluation(content))
    worse, better, unclear = primary.split("the student is ")[1].split("; ")
    assert worse.startswith("worse than its teacher on MedQA (")
    assert "p < 0.001" in worse
    assert better.startswith("better than its teacher on PubMedQA (")
    assert unclear.startswith("not told apart from its teacher on MedMCQA (")
    assert re.search(r"a gap below \d+\.\d points could have gone unseen", unclear)
    assert (
        floors
        == "It is not shown to be above always giving the commonest answer on MedQA and MedMCQA."
    )


def test_a_limited_evaluation_is_called_a_quick_look(folder):
    content = json.loads((folder / "results/comprehensive_evaluation.json").read_text())
    content["options"]["limit"] = 50
    assert "first 50 items" in of_evaluation(content)[-1]


def test_scores_stand_with_interval_and_floor(page):
    text = text_of(page)
    assert re.search(r"MedQA 400 \d\d\.\d % \[\d\d\.\d, \d\d\.\d\] \d\d\.\d % \[.*?\] 27\.0 % always A; chance 25\.0 %", text)  # fmt: skip
    assert "What quantising costs the teacher: not asked for" in text
    assert "Faithfulness to evidence: not run" in text


def test_an_evaluation_without_a_run_or_a_teacher_has_a_page(tmp_path):
    content = write_evaluation(
        tmp_path / "eval_x", tmp_path / "data", {"medqa": (0.6, 0.5)}, items=40
    )
    assert "The student beside its teacher" in write_report(tmp_path / "eval_x").read_text()
    del content["subjects"]["teacher"], content["results"]["benchmarks"]["medqa"]["teacher"]
    content["results"]["retention"] = {"skipped": "there is no teacher to compare with"}
    write_json(tmp_path / "eval_x/results/comprehensive_evaluation.json", content)
    records = tmp_path / "eval_x/results/items/benchmarks.jsonl"
    lines = [line for line in records.read_text().splitlines() if '"teacher"' not in line]
    records.write_text("\n".join(lines) + "\n")
    seal(tmp_path / "eval_x")
    page = write_report(tmp_path / "eval_x").read_text()
    items = items_of(page)["sets"][0]["items"]
    assert {item["outcomes"]["student"] for item in items} == {"right", "wrong"}
    assert len(items) == 40
    assert "There is no teacher" in page or "there is no teacher" in page


def cells(table, row):
    """Column → text of the first row that begins so."""
    found = next(cells for cells in table.rows if cells[0].text == row)
    return dict(zip(table.columns, (cell.text for cell in found), strict=True))


def test_what_was_not_asked_stands_beside_what_could_not_be_read():
    score = {
        "accuracy": wilson(4, 10).to_dict(),
        "unparsed": wilson(3, 10).to_dict(),
        "accuracy_of_parsed": wilson(4, 7).to_dict(),
        "cut_at_limit": 1,
        "too_long": 2,
        "predictions": {"A": 7, "unparsed": 3},
    }
    floor = {"majority_label": "A", "majority_accuracy": 0.3, "random_accuracy": 0.25}
    part = {"protocol": "the answer alone", "answer_tokens": 32}
    part["medqa"] = {"num_items": 10, "floor": floor, "student": score}
    (section,) = sections({"generative": part})
    assert cells(section.tables[1], "MedQA")["not asked: too long"] == "2"


def test_abstentions_stand_below_the_answers_without_claims():
    answers = {"without_claims": wilson(3, 8).to_dict(), "abstained": wilson(2, 8).to_dict()}
    answers |= {"claims": 9, "cut_at_limit": 0, "questions_too_long": 1}
    part = {"prompts": 8, "student": {"answers": answers}, "verifier": {"skipped": "none given"}}
    (section,) = sections({"faithfulness": part})
    (table,) = section.tables
    assert [row[0].text for row in table.rows[:2]] == [
        "answers without claims",
        "answers that say the evidence does not answer",
    ]
    assert cells(table, "answers that say the evidence does not answer")["student"] == "25.0\u00a0%"
    assert cells(table, "questions not asked: too long")["student"] == "1"


def test_how_far_apart_the_options_probabilities_lie_stands_with_what_was_kept(folder):
    content = json.loads((folder / "results/comprehensive_evaluation.json").read_text())
    part = content["results"]["retention"]
    column = "JS of the options, nats"
    (section,) = sections({"retention": part})
    assert column not in section.tables[0].columns  # of written answers there is none
    for found in part["benchmarks"].values():
        found["option_js_nats"] = {"value": 0.25, "interval_95": [0.2, 0.3], "n": 400}
    (section,) = sections({"retention": part})
    assert cells(section.tables[0], "MedQA")[column] == "0.250"


# --- items -----------------------------------------------------------------------------------------


def test_outcomes_are_those_that_retention_counts(folder, page):
    content = json.loads((folder / "results/comprehensive_evaluation.json").read_text())
    for found in items_of(page)["sets"]:
        if not found["name"].startswith("benchmarks/"):
            continue
        counted = content["results"]["retention"]["benchmarks"][found["name"].split("/")[1]]
        outcomes = [item["outcomes"]["student"] for item in found["items"]]
        for name in ("kept", "lost", "gained"):
            assert outcomes.count(name) == counted[name] > 0
        assert outcomes.count("inherited") + outcomes.count("both_wrong") == counted["both_wrong"]
        assert outcomes.count("inherited") > 0


def test_what_cannot_be_read_is_never_inherited():
    unread = {"right": False, "choice": None}
    assert outcome(unread, unread) == "both_wrong"
    assert outcome({"right": False, "choice": 2}, {"right": False, "choice": 2}) == "inherited"


def test_items_carry_their_questions_once(page):
    items = items_of(page)
    assert items["missing"] == []
    assert len(items["questions"]) == 3 * 400 + 3 + 4
    first = next(s for s in items["sets"] if s["name"] == "benchmarks/medqa")["items"][5]
    question = items["questions"][first["question"]]
    assert question["text"] == "Which drug is number 5 of medqa?"
    assert question["options"][question["answer"]] == "drug 5B"


@pytest.mark.parametrize("change", ["gone", "other"])
def test_questions_of_other_data_are_not_shown(folder, tmp_path, change):
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(folder, run)
    shutil.copytree(folder.parent / "data", data)
    file = data / "benchmarks/medqa.jsonl"
    if change == "gone":
        file.unlink()
    else:
        file.write_text(file.read_text().replace("drug", "food"))
    found = browser({"student": run / "results"}, data)
    (why,) = found["missing"]
    assert ("is not there" if change == "gone" else "has changed since the evaluation") in why
    medqa = next(s for s in found["sets"] if s["name"] == "benchmarks/medqa")["items"]
    assert len(medqa) == 400
    assert found["questions"][medqa[0]["question"]] == {"answer": 0}
    medmcqa = next(s for s in found["sets"] if s["name"] == "benchmarks/medmcqa")["items"]
    assert "text" in found["questions"][medmcqa[0]["question"]]


def test_claims_decide_the_outcome_of_an_answer_from_evidence(tmp_path):
    def record(subject, id, *bins):
        claims = [{"text": f"c{n}", "citations": [1], "bin": bin} for n, bin in enumerate(bins)]
        return {"subject": subject, "id": id, "answer": "a", "finished": True, "claims": claims}

    rows = [
        *(
            record("student", "kept", "supported"),
            record("teacher", "kept", "supported", "supported"),
        ),
        *(
            record("student", "lost", "supported", "contradicted"),
            record("teacher", "lost", "supported"),
        ),
        *(record("student", "empty"), record("teacher", "empty", "supported")),
    ]
    results = tmp_path / "results"
    write_lines(results / "items/faithfulness.jsonl", rows)
    evaluation = {"data": {"folder": str(tmp_path), "sha256": {}}}
    write_json(results / "comprehensive_evaluation.json", evaluation)
    seal(tmp_path)
    (found,) = browser({"student": results})["sets"]
    outcomes = {item["id"]: item["outcomes"]["student"] for item in found["items"]}
    assert outcomes == {"kept": "kept", "lost": "lost", "empty": "no_claims"}


def test_records_end_where_lines_end_not_where_texts_do(tmp_path):
    """U+2028 and the like stand within answers as they are."""
    results = tmp_path / "results"
    write_lines(results / "items/x.jsonl", [{"text": "a\u2028b\u0085c"}])
    write_json(results / "comprehensive_evaluation.json", {})
    seal(tmp_path)
    assert read_items(results, "x") == [{"text": "a\u2028b\u0085c"}]


# --- recipe, numbers -------------------------------------------------------------------------------


def test_the_recipe_is_compared_with_the_shipped_one(folder, page, monkeypatch, tmp_path):
    recipe = json.loads((folder / "results/run.json").read_text())["recipe"]
    rows = [[cell.text for cell in row] for row in differences(recipe).rows]
    assert rows == [["lora_r", "16", "8"]]
    assert "lora_r: 8" in page
    monkeypatch.chdir(tmp_path)  # from wherever the page is written
    assert len(differences(recipe).rows) == 1
    assert differences({**recipe, "method": "eleventh"}) is None
    added = differences({**recipe, "lora_r": 16, "weight_decay": 0.1}).rows
    assert [[cell.text for cell in row] for row in added] == [["weight_decay", "not set", "0.1"]]


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [
        (PERCENT, 0.2812, "28.1\u00a0%"),
        (POINTS, -0.0312, "−3.1\u00a0points"),
        (POINTS, 0.0312, "+3.1\u00a0points"),
        (CHANGE, -0.00001, "0.000"),
        (Form(0), 12345, "12,345"),
    ],
)
def test_numbers_are_written_for_readers(form, value, shown):
    assert form(value) == shown
