"""report.html of one run: what it says, that it is whole, and that nothing a model wrote can run in it."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from chromium import Browser, needs_chromium
from report_runs import heldout_records, heldout_totals, write_evaluation, write_json, write_run

from eval.report import write_report
from eval.report.__main__ import main
from eval.report.heldout import changes
from eval.report.items import browser, outcome, read_items
from eval.report.recipe_diff import differences
from eval.report.tables import CHANGE, PERCENT, POINTS, Form
from eval.report.verdict import of_evaluation, of_training
from medistill_trl.errors import UserError

ATTACK = "<script>window.ran=1</script></script><img src=x onerror='window.ran=2'><!--<script>"
CHANCES = {"medqa": (0.28, 0.42), "medmcqa": (0.30, 0.33), "pubmedqa": (0.55, 0.40)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One evaluated run, whose student tries to break out of the page."""
    root = tmp_path_factory.mktemp("report")
    run = write_run(root / "sft_first", answer=ATTACK, flags=["--lora_r", "8"])
    write_evaluation(run, root / "data", CHANCES, answer=ATTACK)
    write_report(run)
    return run


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


def verdict_of(before, after):
    records = heldout_records(before, after)
    totals = heldout_totals(records)
    return of_training(
        totals["before"], totals["after"], changes(totals["before"], totals["after"], records)
    )


def test_the_change_and_its_interval_by_hand():
    """Changes of −1 and −3 nats per token on as many tokens: mean −2, standard error 1, t of one degree 12.706."""
    records = heldout_records([4.0, 4.0], [3.0, 1.0])
    totals = heldout_totals(records)
    found = changes(totals["before"], totals["after"], records)
    assert found["kl_nats"]["value"] == pytest.approx(-2)
    assert found["kl_nats"]["interval_95"] == pytest.approx([-2 - 12.7062, -2 + 12.7062], abs=1e-3)
    assert found["top1"]["value"] == pytest.approx(0.4)
    # 40 bytes for 10 tokens: −2 nats a token are −2/4 nats a byte.
    assert found["bits_per_byte"]["value"] == pytest.approx(-0.5 / 0.693147, rel=1e-5)


def test_the_verdict_follows_the_interval():
    better = verdict_of([4.0, 4.2, 4.1, 4.3], [2.0, 2.1, 2.2, 2.2])
    assert (better.tone, better.lead) == ("better", "Closer to its teacher than before training")
    assert "fell from 4.15 to 2.12 nats per token" in better.sentences[0]
    assert "51\u00a0% of what it was" in better.sentences[0]
    worse = verdict_of([2.0, 2.1, 2.2, 2.2], [4.0, 4.2, 4.1, 4.3])
    assert (worse.tone, worse.lead) == ("worse", "Further from its teacher than before training")
    unclear = verdict_of([4.0, 4.2, 4.1, 4.3], [2.0, 6.0, 2.5, 5.9])
    assert (unclear.tone, unclear.lead) == ("unclear", "Not told apart from the untrained student")
    assert any("The interval holds 0" in sentence for sentence in unclear.sentences)


def test_few_prompts_are_called_few():
    assert any(
        "4 prompts: few" in s
        for s in verdict_of([4.0, 4.2, 4.1, 4.3], [2.0, 2.1, 2.2, 2.2]).sentences
    )
    many = verdict_of([4.0 + n / 100 for n in range(40)], [2.0 + n / 90 for n in range(40)])
    assert not any("few" in sentence for sentence in many.sentences)


def test_totals_alone_give_no_interval_and_no_claim():
    totals = heldout_totals(heldout_records([4.0, 4.2], [2.0, 2.1]))
    found = changes(totals["before"], totals["after"], [])
    verdict = of_training(totals["before"], totals["after"], found)
    assert verdict.tone == "unclear"
    assert "no interval: the run kept totals only" in " ".join(verdict.sentences)


def test_different_tokenizers_are_judged_by_bits_per_byte():
    records = heldout_records([4.0, 4.2, 4.1], [2.0, 2.1, 2.2])
    totals = heldout_totals(records)
    for stage in totals.values():
        stage |= {"kl_nats": None, "top1": None}
    for record in records:
        record |= {"kl_nats": None, "agreed": None}
    found = changes(totals["before"], totals["after"], records)
    assert set(found) == {"ce_nats", "bits_per_byte"}
    assert (
        of_training(totals["before"], totals["after"], found)
        .sentences[0]
        .startswith("bits per byte")
    )


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
    page = write_report(tmp_path / "eval_x").read_text()
    items = items_of(page)["sets"][0]["items"]
    assert {item["outcomes"]["student"] for item in items} == {"right", "wrong"}
    assert len(items) == 40
    assert "There is no teacher" in page or "there is no teacher" in page


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
    (tmp_path / "items").mkdir()
    (tmp_path / "items/faithfulness.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation = {"data": {"folder": str(tmp_path), "sha256": {}}}
    write_json(tmp_path / "comprehensive_evaluation.json", evaluation)
    (found,) = browser({"student": tmp_path})["sets"]
    outcomes = {item["id"]: item["outcomes"]["student"] for item in found["items"]}
    assert outcomes == {"kept": "kept", "lost": "lost", "empty": "no_claims"}


def test_records_end_where_lines_end_not_where_texts_do(tmp_path):
    """U+2028 and the like stand within answers as they are."""
    (tmp_path / "items").mkdir()
    (tmp_path / "items/x.jsonl").write_text('{"text": "a\u2028b\u0085c"}\n')
    assert read_items(tmp_path, "x") == [{"text": "a\u2028b\u0085c"}]


# --- recipe, numbers -------------------------------------------------------------------------------


def test_the_recipe_is_compared_with_the_shipped_one(folder, page):
    recipe = json.loads((folder / "results/run.json").read_text())["recipe"]
    rows = [[cell.text for cell in row] for row in differences(recipe).rows]
    assert rows == [["lora_r", "16", "8"]]
    assert "lora_r: 8" in page
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


# --- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def opened(chromium, folder):
    chromium.open(folder / "results/report.html")
    return chromium


def click(browser, selector):
    browser.run(f"document.querySelector({json.dumps(selector)}).click()")


def text(browser, selector):
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


@needs_chromium
def test_the_page_opens_without_a_complaint_and_runs_nothing_of_the_models(opened):
    opened.wait("!document.getElementById('browser').hidden")
    assert (
        opened.run("document.querySelector('#list .answers > div:last-child .text').textContent")
        == ATTACK
    )
    assert opened.run("document.images.length") == 1
    assert opened.run("window.ran === undefined")
    assert opened.complaints == []


@needs_chromium
def test_markup_that_came_into_the_page_would_not_run(opened):
    opened.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=data: onerror=\"window.ran=3\">');"
        "const s = document.createElement('script'); s.textContent = 'window.ran=4'; document.body.append(s);"
    )
    opened.run("new Promise((done) => setTimeout(done, 200))")
    assert opened.run("window.ran === undefined")
    assert any("Content Security Policy" in said for said in opened.complaints)


@needs_chromium
def test_tables_sort_both_ways_and_by_keyboard(opened):
    column = "[...document.querySelectorAll('#benchmarks table')][0]"
    shown = f"[...{column}.tBodies[0].rows].map((row) => Number(row.cells[2].dataset.sort))"
    header = f"{column}.tHead.rows[0].cells[2]"
    assert opened.run(f"{header}.textContent") == "student"
    given = opened.run(shown)
    opened.run(f"{header}.firstChild.click()")
    assert opened.run(shown) == sorted(given, reverse=True) != given
    assert opened.run(f"{header}.getAttribute('aria-sort')") == "descending"
    opened.run(f"{header}.firstChild.focus()")
    opened.press("Enter", 13)
    assert opened.run(shown) == sorted(given)
    opened.press("Enter", 13)
    assert opened.run(shown) == given
    names = f"[...{column}.tBodies[0].rows].map((row) => row.cells[0].textContent.trim())"
    opened.run(f"{column}.tHead.rows[0].cells[0].firstChild.click()")
    assert opened.run(names) == ["MedMCQA", "MedQA", "PubMedQA"]


@needs_chromium
def test_items_are_filtered_searched_and_paged(opened, folder):
    content = json.loads((folder / "results/comprehensive_evaluation.json").read_text())
    lost = content["results"]["retention"]["benchmarks"]["medqa"]["lost"]
    click(opened, "a[data-set='benchmarks/medqa'][data-outcome='lost']")
    assert opened.run("document.getElementById('set').value") == "benchmarks/medqa"
    assert text(opened, "#count") == f"Items 1 to 20 of {lost}"
    tags = "[...document.querySelectorAll('#list .tag.lost')].length"
    assert opened.run(tags) == 20
    click(opened, "#next")
    assert text(opened, "#count").startswith("Items 21 to ")
    assert text(opened, "#page") == f"page 2 of {-(-lost // 20)}"
    click(opened, "#outcomes button[data-outcome='']")
    assert text(opened, "#count") == "Items 1 to 20 of 400"
    opened.run(
        "const s = document.getElementById('search'); s.value = 'NUMBER 37 of '; s.dispatchEvent(new Event('input'))"
    )
    opened.wait("document.getElementById('count').textContent === 'Items 1 to 1 of 1'")
    assert "Which drug is number 37 of medqa?" in text(opened, "#list")
    assert opened.run("document.querySelectorAll('#list .options li').length") == 4
    assert (
        opened.run("document.querySelector('#list .options .correct .name').textContent")
        == "B. drug 37B right answer"
    )
    click(opened, "#outcomes button[data-outcome='both_wrong']")
    assert (
        opened.run("document.querySelector('#outcomes [aria-pressed=true]').dataset.outcome")
        == "both_wrong"
    )
    assert opened.complaints == []


@needs_chromium
def test_numbers_without_items_are_no_links(chromium, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / "results/items/benchmarks.jsonl").unlink()
    write_report(run)
    chromium.open(run / "results/report.html")
    assert "400" in text(chromium, "#benchmarks table")
    assert chromium.run("document.querySelectorAll('a[data-set]').length") == 0
    assert chromium.complaints == []


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_only_tables_scroll_sideways(chromium, folder, width):
    chromium.open(folder / "results/report.html", width=width, height=800, dark=True)
    click(chromium, "a[data-set='benchmarks/medqa'][data-outcome='lost']")
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
