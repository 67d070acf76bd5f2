"""report.html in a browser: nothing a model wrote runs, and tables, items and links do what they say."""

import json
import shutil

import pytest
from chromium import Browser, needs_chromium
from report_runs import ATTACK, write_attacking_run

from eval.report import write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_attacking_run(tmp_path_factory.mktemp("report"))


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
