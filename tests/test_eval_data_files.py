"""eval/data_files.py: rows are read as the parts need them, or named by file and line."""

import pytest

from eval.data_files import read_rows
from medistill_trl.errors import UserError

TEXT = {"text": str}


def write(folder, content):
    path = folder / "rows.jsonl"
    path.write_text(content)
    return path


def test_blank_lines_are_no_rows(tmp_path):
    path = write(tmp_path, '{"id": "1", "text": "a"}\n\n{"id": "2", "text": "b"}\n   \n\n')
    assert [row["id"] for row in read_rows(path, columns=TEXT)] == ["1", "2"]
    assert len(read_rows(path, 2, TEXT)) == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "2"}', r"rows\.jsonl:3: the row has no text"),
        ('{"id": "2", "text": null}', r"rows\.jsonl:3: text must be a text, got NoneType"),
        ('{"text": "b"}', r"rows\.jsonl:3: the row has no id"),
        ('{"id"', r"rows\.jsonl:3: not JSON"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line(tmp_path, line, expected):
    path = write(tmp_path, f'{{"id": "1", "text": "a"}}\n\n{line}\n')
    with pytest.raises(UserError, match=expected):
        read_rows(path, columns=TEXT)


def test_a_file_of_blank_lines_is_empty(tmp_path):
    with pytest.raises(UserError, match="the file is empty"):
        read_rows(write(tmp_path, "\n\n"))
