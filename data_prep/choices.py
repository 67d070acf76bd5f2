"""Options that mean other options ("Both A and B", "acd", "All of the above"), resolved to their texts."""

import re
from dataclasses import dataclass


class Unconvertible(ValueError):
    """A record that cannot become a long-form question; the message is a short phrase that can be counted."""


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
ONE = r"(?:\(?[A-Ea-e1-5]\)?)"
# "1/2" is a number and "A/B" a name, so a stroke joins no references.
REFERENCE = re.compile(
    rf"(?P<how>(?:both|only|either|neither|all)\b)?\s*(?:of\s+)?(?P<named>(?:the\s+)?(?:options?|choices?)\b)?\s*"
    rf"(?P<letters>{ONE}(?:(?:\s*(?:,|&|\+|;|\band\b|\bor\b|\bnor\b)\s*)+{ONE})*)\s*"
    r"(?P<after>\b(?:only|both|all|alone|(?:of\s+)?the\s+above|above|(?:(?:both|all)\s+)?(?:are|is)\s+(?:correct|true|right))\b)?\W*",
    re.I,
)
BOTH_LETTERS = re.compile(r"both\s+([A-E]{2})\W*", re.I)
GLUED = re.compile(r"(?=[a-e]{2})a?b?c?d?e?")
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
MAY_REFER = "option may refer to other options"
WORD = re.compile(r"[^\W\d_]{3}")
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
    coded = all(CODE.fullmatch(o) or ORDER.fullmatch(o) or ABOVE.fullmatch(o) for o in options)
    if coded and (decoded := _decode(question, options[answer])):
        return decoded
    if sum(bool(LABEL.fullmatch(option)) for option in options) >= 3:
        raise Unconvertible("options are labels only")
    texts = [_resolve(place, options, question) for place in range(len(options))]
    if texts[answer] is None or (coded and not all(ABOVE.fullmatch(o) for o in options)):
        raise Unconvertible(MAY_REFER)
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
    asked_last = any("?" in statement for statement in statements)
    if ABOVE.fullmatch(gold) or max(places) >= len(statements) or asked_last:
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


def _resolve(place: int, options: tuple[str, ...], question: str) -> str | None:
    """What the option says without pointing at another by its letter; None where that cannot be known.

    "A and C" may be two vitamins and "1 and 2" two numbers: only "both A and C", "options 1 and 2" and
    the like say that they mean options.
    """
    option = options[place]
    if match := BOTH_LETTERS.fullmatch(option):
        return _refer("both", list(match[1]), options, question)
    if match := REFERENCE.fullmatch(option):
        letters = re.findall(r"(?<!\w)[A-Ea-e1-5](?!\w)", match["letters"])
        if letters[0].isdigit() and not match["named"] and _numeric(place, options):
            return option
        if match["how"] or match["named"] or match["after"]:
            how = (match["how"] or match["after"] or "").lower()
            return _refer(how, letters, options, question)
        return option if len(letters) == 1 else None
    if GLUED.fullmatch(option):
        return None
    if match := ABOVE.fullmatch(option):
        how = match[1].lower()
        if how in {"all", "none", "any"}:
            return f"{how.capitalize()} of these"
        before = [o for o in options[:place] if not ABOVE.fullmatch(o)]
        return _join(how, [0, 1], tuple(before)) if len(before) == 2 else None
    return option


def _numeric(place: int, options: tuple[str, ...]) -> bool:
    """Whether the numbers stand among numbers: at most one of the other options has words."""
    others = options[:place] + options[place + 1 :]
    return sum(bool(WORD.search(o)) and not _points(o) for o in others) < 2


def _points(option: str) -> bool:
    return bool(ABOVE.fullmatch(option) or REFERENCE.fullmatch(option))


def _refer(how: str, letters: list[str], options: tuple[str, ...], question: str) -> str | None:
    """The options with these letters, unless the letters belong to something else.

    "Both B and C" beside "Hepatitis B" in first place means the viruses, and beside statements "a) … b) …"
    in the stem those.
    """
    if len(_statements(question)[1]) > 1:
        return None
    for letter in letters:
        own = re.compile(rf"(?<![\w'’-]){letter}(?![\w'’-])(?!\s+[a-z])", re.I)
        named = [place for place, o in enumerate(options) if not _points(o) and own.search(o)]
        if named and named != [_place(letter)]:
            return None
    return _join(how, [_place(letter) for letter in letters], options)


def _place(letter: str) -> int:
    return int(letter) - 1 if letter.isdigit() else "ABCDE".index(letter.upper())


def _join(how: str, places: list[int], options: tuple[str, ...]) -> str | None:
    """The texts of several options in one: "Both oedema and ascites"."""
    if max(places) >= len(options) or any(_points(options[place]) for place in places):
        return None
    texts = [options[place].rstrip(" .") for place in places]
    if len(texts) == 1:
        return f"{texts[0]} only"
    word = {"either": "or", "neither": "nor"}.get(how, "and")
    joined = f" {word} ".join([", ".join(texts[:-1]), texts[-1]])
    together = how in {"both", "either", "neither"} and len(texts) == 2
    return f"{how.capitalize()} {joined}" if together else joined
