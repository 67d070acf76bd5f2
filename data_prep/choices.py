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
CODE = re.compile(r"\(?([a-e]{1,5}|[a-e](?:\s*[,&]\s*[a-e])+)\)?")
ORDER = re.compile(r"[a-eA-E](?:\s*[>\-→<]+\s*[a-eA-E])+|[A-E]{3,5}")
MATCHING = re.compile(
    r"\b[A-Ea-e]\s*[-–=:]\s*(?:[1-5]|[ivx]+\b|[p-s]\b).{0,8}\b[B-Eb-e]\s*[-–=:]\s*(?:[1-5]|[ivx]+\b|[p-s]\b)",
    re.S,
)
SYMBOLS = re.compile(r"[\W_]+")
MARKS = [re.compile(rf"\(?(?<![A-Z(]){letter}\)\s*|\({letter}\)\s*", re.I) for letter in "abcdef"]


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
    if _all_like(CODE, [o for o in options if not ABOVE.fullmatch(o)]) or _all_like(ORDER, options):
        return _decode(question, options, answer)
    if sum(bool(LABEL.fullmatch(option)) for option in options) >= 3:
        raise Unconvertible("options are labels only")
    texts = [_resolve(option, options) for option in options]
    plain = [text for text, meta in texts if not meta]
    listed = list(dict.fromkeys(plain + [text for text, meta in texts if meta]))
    text, meta = texts[answer]
    return Choices(question, tuple(listed), text, meta=meta)


def _all_like(pattern: re.Pattern, options: list[str] | tuple[str, ...]) -> bool:
    """Whether all options are codes: letters in ascending order, none twice."""
    if len(options) < 2 or not all(pattern.fullmatch(option) for option in options):
        return False
    if pattern is CODE:
        letters = [re.findall(r"[a-e]", option) for option in options]
        return all(found == sorted(set(found)) for found in letters)
    return all(
        len(set(re.findall(r"[a-e]", o.lower()))) == len(re.findall(r"[a-e]", o.lower()))
        for o in options
    ) and (len({"".join(sorted(re.findall(r"[a-e]", o.lower()))) for o in options}) == 1)


def _decode(question: str, options: tuple[str, ...], answer: int) -> Choices:
    """Options like "acd" or "b>a>c", whose statements stand in the stem as "a) … b) …"."""
    stem, statements = _statements(question)
    if len(statements) < 2:
        raise Unconvertible("options are labels only")
    gold = options[answer]
    if ABOVE.fullmatch(gold):
        raise Unconvertible("option letters cannot be removed")
    places = ["abcdef".index(letter) for letter in re.findall(r"[a-f]", gold.lower())]
    if max(places) >= len(statements):
        raise Unconvertible("option letters cannot be removed")
    chosen = [statements[place] for place in places]
    if ORDER.fullmatch(gold):
        return Choices(
            stem,
            tuple(sorted(statements)),
            " > ".join(chosen) if ">" in gold else ", then ".join(chosen),
            several=True,
        )
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
        question[start:end].strip(" ,;.\n") for (_, start), end in zip(spans, ends, strict=True)
    ]
    if not all(texts):
        return question, []
    return question[: spans[0][0]], [text[:1].upper() + text[1:] for text in texts]


def _resolve(option: str, options: tuple[str, ...]) -> tuple[str, bool]:
    """The option's text and whether it speaks about other options."""
    if match := BOTH_LETTERS.fullmatch(option):
        return _join("both", list(match[1].upper()), options), True
    match = REFERENCE.fullmatch(option)
    others_are_texts = sum(len(o) > 3 and not REFERENCE.fullmatch(o) for o in options) >= 2
    if match and (others_are_texts or match["how"]) and not re.fullmatch(r"[\d\s,/&+.-]+", option):
        return _join(
            (match["how"] or "both").lower(),
            re.findall(r"[A-Ea-e1-5]\b", match["letters"]),
            options,
        ), True
    if match := ABOVE.fullmatch(option):
        how = match[1].lower()
        rest = [o for o in options if not ABOVE.fullmatch(o) and not REFERENCE.fullmatch(o)]
        if how in {"both", "either", "neither"} and len(rest) == 2:
            word = {"both": "and", "either": "or", "neither": "nor"}[how]
            return f"{how.capitalize()} {_lower(rest[0])} {word} {_lower(rest[1])}", True
        if (how in {"both", "either", "neither"} and "above" in option.lower()) or how == "both":
            raise (
                Unconvertible("option letters cannot be removed")
                if len(rest) < 2
                else Unconvertible("options cannot be told apart")
            )
        return f"{how.capitalize()} of these", True
    return option, False


def _join(how: str, letters: list[str], options: tuple[str, ...]) -> str:
    places = ["12345".index(x) if x.isdigit() else "ABCDE".index(x.upper()) for x in letters]
    if max(places) >= len(options) or any(
        ABOVE.fullmatch(options[p]) or REFERENCE.fullmatch(options[p]) for p in places
    ):
        raise Unconvertible("option letters cannot be removed")
    texts = [options[place].rstrip(" .") for place in places]
    texts = [texts[0], *(_lower(text) for text in texts[1:])]
    word = {"either": "or", "neither": "nor"}.get(how, "and")
    if how == "neither":
        return f"Neither {_lower(texts[0])} nor {' nor '.join(texts[1:])}"
    return (
        f" {word} ".join(texts)
        if len(texts) == 2
        else f"{', '.join(texts[:-1])} {word} {texts[-1]}"
    )


def _lower(text: str) -> str:
    """The text as it stands inside a sentence: only an ordinary capitalised first word is lowered."""
    first = text.split(" ", 1)[0]
    return text[:1].lower() + text[1:] if first[1:].islower() and not first.endswith("'s") else text
