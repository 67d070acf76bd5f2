"""The README's first screen. That its commands, links and paths exist is for test_docs.py."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_first_commands_are_the_ones_to_try():
    block = re.search(r"^```bash\n(.*?)^```", README, re.M | re.S)[1]
    assert [line.split("#")[0].strip() for line in block.splitlines()] == ["make demo", "make test"]


def test_the_result_table_holds_numbers():
    table = README.split("```")[0]
    rows = [line for line in table.splitlines() if line.startswith(("| KL", "| cross", "| top-1"))]
    assert len(rows) == 3
    for row in rows:
        assert len(re.findall(r"\d+(?:\.\d+)?%?", row.split("|", 2)[2])) == 2, row
