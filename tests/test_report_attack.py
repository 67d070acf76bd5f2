"""A report in which every text that came from elsewhere tries to break out: nothing of it runs."""

import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from chromium import Browser, needs_chromium
from report_runs import write_comparison, write_evaluation, write_run
from sealed import read, seal

from eval.report import write_report
from medistill_trl.sealed_json import write_record

ATTACKS = (
    "<script>window.ran=1</script>",
    "</script><img src=x onerror='window.ran=2'><!--<script>",
    '"><svg onload=window.ran=3>',
    "' onmouseover='window.ran=4",
    "javascript:window.ran=5",
    "{{ 7 * 7 }}{% raw %}</style><style>body{display:none}</style>",
    "]]></title></textarea><iframe srcdoc='<script>parent.ran=6</script>'></iframe>",
    "\u2028</ScRiPt\t><IMG SRC=x ONERROR=window.ran=7>\u202e",
)
ALL = " ".join(ATTACKS)
NAME = "<img src=x onerror=window.ran=8>"  # of a folder, so without a slash


class Elements(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def poison(value, kept: tuple[str, ...]):
    """The same with the attacks behind every text, but under these keys."""
    if isinstance(value, str):
        return value + ALL
    if isinstance(value, list):
        return [poison(item, kept) for item in value]
    if isinstance(value, dict):
        return {key: item if key in kept else poison(item, kept) for key, item in value.items()}
    return value


def rewrite(path: Path, kept: tuple[str, ...]) -> None:
    if path.suffix == ".json":
        write_record(path, poison(read(path), kept))
    else:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        path.write_text("".join(json.dumps(poison(row, kept)) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two runs of a hostile origin, with their data, and what compares them."""
    root = tmp_path_factory.mktemp("attack")
    runs = {}
    for name, folder in (("sft", NAME), ("logit_kd", "javascript:window.ran=9")):
        run = runs[name] = write_run(root / folder, flags=["--system_prompt", json.dumps(ALL)])
        data = root / "data"
        write_evaluation(run, data, {"medqa": (0.3, 0.5)}, items=8, answer=ALL)
        for path in sorted(data.rglob("*.jsonl")):
            if ALL not in path.read_text():
                rewrite(path, ("id",))
        results = run / "results"
        for part in ("benchmarks", "fidelity", "heldout"):
            rewrite(
                results / f"items/{part}.jsonl", ("id", "benchmark", "subject", "texts", "stage")
            )
        rewrite(results / "heldout_examples.json", ())
        rewrite(results / "run.json", ("method", "digest"))
        kept = ("folder", "data", "labels", "majority_label", "method", "recipe")
        rewrite(results / "comprehensive_evaluation.json", kept)
        _renew_data_digests(results / "comprehensive_evaluation.json", data)
        seal(run)
        write_report(run)
    compared = root  # so that links begin with a folder's name
    write_comparison(compared, runs)
    kept = ("configurations", "baseline", "quality", "order", "configuration", "measure", "minus", "family", "better", "front", "method")  # fmt: skip
    content = read(compared / "comparison.json")
    content["studies"] = [{"name": "s", "description": "d"}]
    content["missing"] = [{"run": "r", "parts": ["p"], "command": "c"}]
    content["left_out"] = {ALL: "why"}
    write_record(compared / "comparison.json", poison(content, kept))
    write_report(compared)
    return root


def _renew_data_digests(path: Path, data: Path) -> None:
    content = read(path)
    files = sorted(data.rglob("*.jsonl"))
    digests = {str(f.relative_to(data)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    content["data"]["sha256"] = digests
    write_record(path, content)


@pytest.fixture(scope="module")
def pages(folder) -> list[Path]:
    return [folder / NAME / "results/report.html", folder / "report.html"]


def test_no_text_becomes_an_element_or_an_attribute(pages):
    for path in pages:
        text = path.read_text()
        assert text.count("window.ran") > 40
        elements = Elements(text).found
        assert [tag for tag, _ in elements].count("script") == 2
        assert [tag for tag, _ in elements].count("style") == 1
        assert {tag for tag, _ in elements}.isdisjoint(
            {"iframe", "object", "embed", "base", "form"}
        )
        for tag, attributes in elements:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
            assert not attributes.get("href", "#").startswith("javascript:")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@needs_chromium
def test_nothing_of_it_runs_whatever_is_opened(chromium, pages):
    for path in pages:
        chromium.open(path)
        chromium.wait("!document.getElementById('browser').hidden")
        names = chromium.run("[...document.getElementById('set').options].map((o) => o.value)")
        assert len(names) >= 2
        for name in names:
            chromium.run(
                f"{{ const s = document.getElementById('set'); s.value = {json.dumps(name)};"
                "s.dispatchEvent(new Event('change'));"
                "for (const d of document.querySelectorAll('details')) d.open = true;"
                "for (const e of document.querySelectorAll('*')) e.dispatchEvent(new Event('mouseover')); }"
            )
            shown = chromium.run("document.getElementById('list').textContent")
            assert "window.ran=1" in shown
        for number in range(chromium.run("document.querySelectorAll('a[href]').length")):
            link = f"document.querySelectorAll('a[href]')[{number}]"
            if chromium.run(f"{link}.protocol") == "javascript:":
                pytest.fail(f"{path}: a link of a script")
        chromium.run("new Promise((done) => setTimeout(done, 200))")
        assert chromium.run("window.ran === undefined"), path
        assert chromium.run("getComputedStyle(document.body).display") != "none"
        assert chromium.complaints == []
