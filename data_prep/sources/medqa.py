"""MedQA, the four-option US release (Jin et al. 2020, arXiv 2009.13081).

Schemas: the release's and the hub's `question, options {"A": …}, answer, answer_idx`; `sent1,
ending0…ending3, label` of the -hf variant; `options [{"key", "value"}]` of bigbio.
"""

from data_prep.schema import Record
from data_prep.sources import BENCHMARK, POOL, RESERVE, Hub, Source
from data_prep.sources.rows import BadRow, Dropped, clean, content_id, identity, index, text

LETTERS = ("A", "B", "C", "D")


def normalise(row: dict, split: str, facts: None) -> Record:
    question = _joined(row)
    options = _options(row)
    if len(options) != len(LETTERS) and split != "train":
        raise Dropped(f"{len(options)} options: the benchmark is the four-option release")
    answer = _answer(row, options)
    texts = tuple(options.values())
    return Record(
        source="medqa",
        split=split,
        native_id=identity(row, "id") or content_id(question, *texts),
        question=question,
        options=texts,
        answer=answer,
        explanation=clean(row.get("explanation") or "", "explanation"),
    )


def _joined(row: dict) -> str:
    if "sent1" not in row:
        return text(row, "question")
    rest = row.get("sent2") or ""
    return f"{text(row, 'sent1')} {clean(rest, 'sent2')}".strip()


def _options(row: dict) -> dict[str, str]:
    """Letter → text, in the order of the letters."""
    if "ending0" in row:
        options = {letter: row.get(f"ending{i}") for i, letter in enumerate(LETTERS)}
    else:
        options = row.get("options")
    if isinstance(options, list):
        if not all(isinstance(o, dict) and isinstance(o.get("key"), str) for o in options):
            raise BadRow("options must be texts by letter, or a list of key and value")
        options = {o["key"]: o.get("value") for o in options}
    if not isinstance(options, dict) or not options:
        raise BadRow(f"options must be texts by letter, got {type(options).__name__}")
    return {str(letter): _unquoted(options[letter], letter) for letter in sorted(options, key=str)}


def _unquoted(value: object, letter: str) -> str:
    """An option without what the release's way through a spreadsheet left: `…\\n"`, `\"\"\"…\"\"\"`."""
    option = clean(value, f"option {letter}")
    if option.endswith('\n"'):
        option = option[:-2].rstrip()
    if '""' in option and option.startswith('"') and option.endswith('"'):
        option = option[1:-1].replace('""', '"')
    if not option.strip('"'):
        raise Dropped("has an empty option")
    return option


def _answer(row: dict, options: dict[str, str]) -> int:
    if "answer_idx" not in row:
        return index(row.get("label"), "label", len(options))
    letter = clean(row["answer_idx"], "answer_idx")
    if letter not in options:
        raise BadRow(f"answer_idx is {letter!r}, not one of {', '.join(options)}")
    told = row.get("answer")
    if told is not None and _unquoted(told, "named by answer") != options[letter]:
        raise BadRow(f"answer is not the text of option {letter}, which answer_idx names")
    return list(options).index(letter)


SOURCE = Source(
    name="medqa",
    hub=Hub(
        "GBaker/MedQA-USMLE-4-options",
        "0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18",
        ("phrases_no_exclude_*.jsonl",),
    ),
    splits=(
        ("(?i)mainland|taiwan|qbank", None),
        ("train", "train"),
        ("dev|valid", "validation"),
        ("test", "test"),
    ),
    roles={"train": POOL, "validation": RESERVE, "test": BENCHMARK},
    normalise=normalise,
)
