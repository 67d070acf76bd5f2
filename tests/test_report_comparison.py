"""report.html of a comparison: the answer, every measure, and the items of all students."""

import json

import pytest
from chromium import Browser, needs_chromium
from report_runs import write_comparison, write_evaluation, write_run
from sealed import read

from eval.report import write_report
from eval.report.__main__ import main
from medistill_trl.sealed_json import write_record

CHANCES = {"sft": (0.3, 0.5), "logit_kd": (0.4, 0.5)}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study's folder with two runs and their comparison."""
    root = tmp_path_factory.mktemp("study")
    runs = {}
    for name, flags in (("sft", []), ("logit_kd", ["--lora_r", "8"])):
        runs[name] = write_run(root / name, flags=flags)
        write_evaluation(runs[name], root / "data", {"medqa": CHANCES[name]}, items=60)
    write_report(runs["sft"])
    write_comparison(root / "comparison", runs)
    return root


@pytest.fixture(scope="module")
def page(study):
    return write_report(study).read_text()


def items_of(page):
    start = page.index('id="items-data">') + len('id="items-data">')
    return json.loads(page[start : page.index("</script>", start)])


def test_the_command_finds_a_studys_comparison(study, capsys):
    assert main([str(study)]) == 0
    assert f"report: {study}/comparison/report.html" in capsys.readouterr().out
    assert main([str(study / "comparison")]) == 0


def test_a_study_that_was_not_compared_is_told_how(tmp_path, capsys):
    (tmp_path / "study.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert f"python -m eval.compare {tmp_path}" in capsys.readouterr().err


def test_a_picture_that_is_gone_is_named(study, tmp_path, capsys):
    write_comparison(tmp_path, {name: study / name for name in CHANCES})
    (tmp_path / "benchmark_comparison.png").unlink()
    assert main([str(tmp_path)]) == 2
    assert "benchmark_comparison.png: is missing" in capsys.readouterr().err


def test_the_lead_says_no_more_than_the_tests(study, page, tmp_path):
    assert "logit_kd comes first</h2>" in page
    assert "By KL logit_kd comes first of 2." in page
    write_comparison(tmp_path, {n: study / n for n in CHANCES}, told_apart=False)
    assert "logit_kd comes first, but is not told apart from any other</h2>" in write_report(tmp_path).read_text()  # fmt: skip


def test_of_one_seed_the_page_speaks_of_students_and_never_of_methods(study, tmp_path):
    write_comparison(tmp_path, {n: study / n for n in CHANCES}, seeds=1)
    page = write_report(tmp_path).read_text()
    assert "logit_kd comes first of these single students</h2>" in page
    assert 'class="verdict unclear"' in page
    assert "these students alone" in page


def test_measures_stand_with_teacher_floor_and_cost(page):
    flat = page.replace("\u00a0", " ")
    for shown in ("1.300", "[1.200, 1.400]", "the baseline", "always the commonest answer", "27.0 %", "p = 0.001", "+10.0 points", "trained on the packaged sample"):  # fmt: skip
        assert shown in flat, shown


def test_items_have_the_answers_of_all_students(page):
    items = items_of(page)
    assert items["students"] == ["sft", "logit_kd"]
    medqa = next(found for found in items["sets"] if found["name"] == "benchmarks/medqa")["items"]
    assert len(medqa) == 60
    assert list(medqa[0]["answers"]) == ["teacher", "sft", "logit_kd"]
    assert set(medqa[0]["outcomes"]) == {"sft", "logit_kd"}
    assert "chances" not in medqa[0]["answers"]["sft"]
    assert len(items["questions"]) == 60 + 3 + 4


def test_runs_are_linked_where_they_have_a_page_and_recipes_compared(page):
    assert 'href="./../sft/results/report.html"' in page
    assert "../logit_kd/results/report.html" not in page
    recipes = page[page.index("Where their recipes differ") :]
    assert 'lora_r</th><td class="number"' not in recipes  # values are words
    assert all(f">{value}</td>" in recipes for value in ("16", "8"))


def test_a_moved_study_keeps_its_items_and_one_without_runs_its_tables(study, page, tmp_path):
    content = read(study / "comparison/comparison.json")
    for configuration in content["configurations"]:
        configuration["runs"] = [f"elsewhere/{configuration['name']}"]
    write_record(study / "comparison/comparison.json", content)
    assert len(items_of(write_report(study).read_text())["sets"]) == 3
    write_comparison(tmp_path, {"sft": tmp_path / "gone", "logit_kd": tmp_path / "too"})
    alone = write_report(tmp_path).read_text()
    assert 'id="items"' not in alone
    assert "1.300" in alone


@needs_chromium
def test_outcomes_follow_the_student_that_is_chosen(study, page, tmp_path):
    content = items_of(page)
    browser = Browser(tmp_path)
    browser.open(study / "comparison/report.html", width=360)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    browser.run(
        "const set = document.getElementById('set'); set.value = 'benchmarks/medqa';"
        "set.dispatchEvent(new Event('change'))"
    )
    medqa = next(found for found in content["sets"] if found["name"] == "benchmarks/medqa")["items"]
    for name in ("sft", "logit_kd"):
        browser.run(
            f"(() => {{ const s = document.getElementById('student'); s.value = '{name}';"
            "s.dispatchEvent(new Event('change')) })()"
        )
        kept = sum(item["outcomes"][name] == "kept" for item in medqa)
        shown = browser.run(
            "document.querySelector(\"#outcomes [data-outcome='kept']\").textContent"
        )
        assert shown == f"kept ({kept})"
    assert browser.complaints == []
    browser.close()
