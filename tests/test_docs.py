"""What the documents name exists: files, headings, modules, flags, recipes, papers."""

import ast
import glob
import importlib.metadata
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from data_prep import build
from eval import compare, run
from medistill_trl import recipe
from medistill_trl.study import definition, grid
from medistill_trl.study.__main__ import parse as parse_study

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = "recipes|medistill_trl|accelerate_configs|data_prep|eval|tests|benchmarks|docs"
# Of a data folder, and of a tracker: not of the repository.
ELSEWHERE = re.compile(r"benchmarks/(?!\w+\.py)|eval/heldout_")
PLACEHOLDER = re.compile(r"NAME|<|…|\.\.\.|\bX\b|\bmine\b")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def commands(page: Path) -> list[str]:
    """The commands of a page's bash blocks, and of its indented ones, each on one line."""
    text = page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    blocks += re.findall(r"((?:^    (?:accelerate|python|make) .*\n(?:^ {8}.*\n)*)+)", text, re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = [
    (name, line) for name, page in zip(NAMES, PAGES, strict=True) for line in commands(page)
]


def of(pattern: str) -> list[tuple[str, str]]:
    return [found for found in COMMANDS if re.match(pattern, found[1])]


def words_after(command: str, start: str) -> list[str]:
    words = shlex.split(command, comments=True)
    return words[words.index(start) + 1 :]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The repository with the sample as `data`, as it is where the commands are given."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("data", "outputs"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "data").symlink_to(ROOT / "data_prep/sample")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- files and headings


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made from their words."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


def test_anchors_are_made_as_they_are_linked(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A, b\n```bash\n# none\n```\n## The scale: 64 / 4 / 4\n### [SFT](x.md)\n")
    assert anchors(page) == {"a-b", "the-scale-64--4--4", "sft"}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    for link in links:
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def expanded(path: str) -> list[str]:
    """x/{a,b}.py as x/a.py and x/b.py."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        return [path]
    each = [path.replace(braces[0], word.strip(), 1) for word in braces[1].split(",")]
    return [found for one in each for found in expanded(one)]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_path_in_words_or_code_exists(page):
    found = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*{{}},<>…-]*)", page.read_text())
    for path in found:
        if not PLACEHOLDER.search(path) and not ELSEWHERE.match(path):
            for one in expanded(path.rstrip(".,")):
                assert glob.glob(str(ROOT / one)), one


# --- commands


def test_the_pages_have_commands():
    assert len(of("python -m data_prep.build")) >= 3
    assert len(of("python -m eval.run")) >= 3
    assert len(of("accelerate launch")) >= 20


def importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_module_and_target_exists(page, command):
    for module in re.findall(r"python -m ([\w.]+)", command):
        assert importable(module)
    if command.startswith("make "):
        target = command.split()[1]
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize(("page", "command"), of("accelerate launch"))
def test_every_launch_names_a_valid_recipe(page, command, checkout):
    words = shlex.split(re.sub(r"\[.*?\]", "", command), comments=True)
    script = words.index("recipes/run.py")
    if "--config_file" in words[:script]:
        assert Path(words[words.index("--config_file") + 1]).is_file()
    if "--report_to" in words:
        tracker = words[words.index("--report_to") + 1]
        if tracker not in {d.name for d in importlib.metadata.distributions()}:
            pytest.skip(f"{tracker} is not installed")
    recipe.load(words[script + 1 :])


@pytest.mark.parametrize(("page", "command"), of("python -m data_prep.build"))
def test_every_build_is_understood(page, command):
    build._parser().parse_args(words_after(command, "data_prep.build"))


@pytest.mark.parametrize(("page", "command"), of("python -m eval.run"))
def test_every_evaluation_is_understood(page, command, checkout):
    words = words_after(command, "eval.run")
    if "--help" not in words:
        run.parse(words)


@pytest.mark.parametrize(("page", "command"), of("python -m eval.compare"))
def test_every_comparison_is_understood(page, command):
    compare.parse(words_after(command, "eval.compare"))


@pytest.mark.parametrize(("page", "command"), of("python -m medistill_trl.study"))
def test_every_study_is_valid(page, command, checkout):
    given = parse_study(words_after(command, "medistill_trl.study"))
    study = definition.read(given.study, given.overlays, given.set)
    assert grid.expand(study, checkout / "outputs")


@pytest.mark.parametrize(("page", "command"), of("python -c"))
def test_every_line_of_python_imports_what_exists(page, command):
    tree = ast.parse(shlex.split(command)[2])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert name.name in vars(module)


# --- papers


def test_every_paper_the_project_names_is_in_the_list():
    listed = (ROOT / "docs/papers.md").read_text()
    for folder in ("medistill_trl", "eval", "data_prep", "recipes", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".md"):
                for number in re.findall(r"arXiv (\d{4}\.\d{4,5})", path.read_text()):
                    assert number in listed, f"{path}: {number}"


def test_every_method_has_its_paper_in_bold():
    listed = (ROOT / "docs/papers.md").read_text()
    bold = set(re.findall(r"\*\*.*?arxiv.org/abs/(\d{4}\.\d{4,5})", listed))
    own = {
        re.search(r'paper="arXiv (\S+)"', path.read_text())[1]
        for name in recipe.methods()
        for path in (
            ROOT / f"medistill_trl/methods/{name}.py",
            ROOT / f"medistill_trl/methods/{name}/__init__.py",
        )
        if path.is_file()
    }
    assert len(own) == 10
    assert own == bold
