"""Options that mean other options ("Both A and B", "acd", "All of the above"), resolved to their texts."""

import re
from dataclasses import dataclass


class Unconvertible(ValueError):
    """A record that cannot become a long-form question.

    Args:
        reason: A short stable phrase; the keys of the count table of the data card.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Choices:
    """The options without letters.

    Args:
        question: The question, without the statements that its options pointed at.
        listed: The texts to list where the question needs its options, those that mean others last.
        answer: The gold answer.
        several: The question lists statements of which one or more hold.
        meta: The gold answer speaks about the other options (all, none, both).
    """

    question: str
    listed: tuple[str, ...]
    answer: str
    several: bool = False
    meta: bool = False


ABOVE = re.compile(
    r"(all|none|any|both|neither|either)(?:\s+of)?(?:\s+(?:the|these|them|those|above|following|options))*\W*",
    re.I,
)
LETTERS = r"(?:\(?[A-Ea-e1-5]\)?)"
REFERENCE = re.compile(
    rf"(?P<how>both|only|either|neither|all)?\s*(?:options?\s*)?"
    rf"(?P<letters>{LETTERS}(?:(?:\s*(?:,|&|\+|/|;|\band\b|\bor\b|\bnor\b)\s*)+{LETTERS})+)\s*(?:only|both|(?:are|is)\s+(?:correct|true))?\W*",
    re.I,
)
BOTH_LETTERS = re.compile(r"both\s+([A-E]{2})\W*", re.I)
LABEL = re.compile(
    r"(?:(?:figure|image|picture|point|structure|area|curve|graph|label|option|marker)\s*)?\(?[A-Ea-e]\)?\.?",
    re.I,
)
CODE = re.compile(r"[a-eA-E](?:[\s,&]*(?:and\s+)?[a-eA-E]){0,4}(?:\s+only)?")
ORDER = re.compile(r"[a-eA-E](?:\s*[>→<-]+\s*[a-eA-E])+")
MATCHING = re.compile(
    r"\b[A-Ea-e]\s*[-–=:]\s*(?:[1-5]|[ivx]+\b|[p-s]\b).{0,8}\b[B-Eb-e]\s*[-–=:]\s*(?:[1-5]|[ivx]+\b|[p-s]\b)",
    re.S,
)
SYMBOLS = re.compile(r"[\W_]+")
LETTER = re.compile(r"[a-e](?!nd)(?<!and)")
MARKS = [re.compile(rf"\(?{x}\)\s*|(?<!\w){x}\.\s", re.I) for x in "abcdef"]


def resolve_choices(question: str, options: tuple[str, ...], answer: int) -> Choices:
    """The texts of the options and of the gold answer.

    Args:
        question: The stem, which may hold the statements that coded options point at.
        options: The options without their own letters.
        answer: Index of the right option.

    Raises:
        Unconvertible: The options mean nothing without what the record lacks.
    """
    options = tuple(" ".join(option.strip().rstrip('"').split()) for option in options)
    if not options[answer] or (SYMBOLS.fullmatch(options[answer]) and len(options[answer]) > 0):
        raise Unconvertible("options are symbols only")
    if any(MATCHING.search(option) for option in options):
        raise Unconvertible("options are matching codes")
    if all(CODE.fullmatch(o) or ORDER.fullmatch(o) or ABOVE.fullmatch(o) for o in options) and (
        decoded := _decode(question, options[answer])
    ):
        return decoded
    if sum(bool(LABEL.fullmatch(option)) for option in options) >= 3:
        raise Unconvertible("options are labels only")
    texts = [_resolve(place, options) for place in range(len(options))]
    if texts[answer] is None:
        raise Unconvertible("option letters cannot be removed")
    meta = [text != option for text, option in zip(texts, options, strict=True)]
    order = sorted(range(len(options)), key=lambda place: meta[place])  # stable: meta options last
    listed = dict.fromkeys(texts[place] for place in order if texts[place])
    return Choices(question, tuple(listed), texts[answer], meta=meta[answer])


def _decode(question: str, gold: str) -> Choices | None:
    """Options like "acd" or "b>a>c", whose statements stand in the stem as "a) … b) …"."""
    stem, statements = _statements(question)
    if len(statements) < 2:
        return None
    places = ["abcdef".index(letter) for letter in LETTER.findall(gold.lower())]
    if ABOVE.fullmatch(gold) or max(places) >= len(statements):
        raise Unconvertible("option letters cannot be removed")
    chosen = [statements[place] for place in places]
    if ORDER.fullmatch(gold):  # listed by name, so that the order given is not the answer
        joined = (" > " if ">" in gold else ", then ").join(chosen)
        return Choices(stem, tuple(sorted(statements)), joined, meta=True)
    return Choices(stem, tuple(statements), "; ".join(chosen), several=True)


def _statements(question: str) -> tuple[str, list[str]]:
    """The stem before "a)" and the statements behind "a)", "b)", … in order."""
    spans, position = [], 0
    for mark in MARKS:
        match = mark.search(question, position)
        if not match:
            break
        spans.append(match.span())
        position = match.end()
    if not spans:
        return question, []
    ends = [start for start, _ in spans[1:]] + [len(question)]
    texts = [
        question[start:end].strip(" ,;.|\n") for (_, start), end in zip(spans, ends, strict=True)
    ]
    if not all(texts):
        return question, []
    return question[: spans[0][0]], [text[:1].upper() + text[1:] for text in texts]


def _resolve(place: int, options: tuple[str, ...]) -> str | None:
    """What the option says without pointing at another by its letter; None where that cannot be known."""
    option = options[place]
    if match := BOTH_LETTERS.fullmatch(option):
        return _join("both", match[1], options)
    match = REFERENCE.fullmatch(option)
    if match and (
        match["how"] or sum(len(o) > 3 and not REFERENCE.fullmatch(o) for o in options) > 1
    ):
        letters = re.findall(r"\b[A-Ea-e1-5]\b", match["letters"])
        return _join((match["how"] or "").lower(), "".join(letters), options)
    if match := ABOVE.fullmatch(option):
        how = match[1].lower()
        if how in {"all", "none", "any"}:
            return f"{how.capitalize()} of these"
        before = [o for o in options[:place] if not ABOVE.fullmatch(o)]
        return _join(how, "AB", tuple(before)) if len(before) == 2 else None
    return option


def _join(how: str, letters: str, options: tuple[str, ...]) -> str | None:
    """The texts of several options in one: "Both oedema and ascites"."""
    places = [int(x) - 1 if x.isdigit() else "ABCDE".index(x.upper()) for x in letters]
    if max(places) >= len(options):
        return None
    texts = [options[place].rstrip(" .") for place in places]
    if any(ABOVE.fullmatch(text) or REFERENCE.fullmatch(text) for text in texts):
        return None
    word = {"either": "or", "neither": "nor"}.get(how, "and")
    joined = f" {word} ".join([", ".join(texts[:-1]), texts[-1]])
    return (
        f"{how.capitalize()} {joined}"
        if how in {"both", "either", "neither"} and len(texts) == 2
        else joined
    )
