"""The README's commands exist and its recipes are valid."""

import re
import shlex

import pytest
from conftest import ROOT

from medistill_trl import recipe

BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
COMMANDS = [
    line
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
LAUNCHES = [c for c in COMMANDS if "recipes/run.py" in c]
MAKES = [c for c in COMMANDS if c.startswith("make")]


def test_the_readme_has_commands():
    assert len(LAUNCHES) >= 4
    assert {"make demo", "make test"} <= {c.split("#")[0].strip() for c in MAKES}


@pytest.mark.parametrize("command", LAUNCHES)
def test_every_launch_command_names_a_valid_recipe(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    script = words.index("recipes/run.py")
    if "--config_file" in words[:script]:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    recipe.load(words[script + 1 :])


@pytest.mark.parametrize("command", MAKES)
def test_every_make_target_exists(command):
    target = command.split("#")[0].split()[1]
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M)


def test_the_result_table_holds_numbers():
    table = (ROOT / "README.md").read_text().split("```")[0]
    rows = [line for line in table.splitlines() if line.startswith(("| KL", "| cross", "| top-1"))]
    assert len(rows) == 3
    for row in rows:
        assert len(re.findall(r"\d+(?:\.\d+)?%?", row.split("|", 2)[2])) == 2, row


def test_every_path_the_readme_links_to_exists():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def test_every_module_command_can_be_imported():
    import importlib.util

    for command in COMMANDS:
        if match := re.search(r"python -m ([\w.]+)", command):
            assert importlib.util.find_spec(match.group(1)), command
