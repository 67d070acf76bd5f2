"""From an answer to its claims: sentences, and the passages each one cites. Text rules, no model.

    Statins lower LDL cholesterol [1][2]. They act on HMG-CoA reductase, e.g. in the liver. [2]

has two claims, which cite 1 and 2, and 2. A claim is a sentence that states something: a question, a heading and
a bare verdict (Yes. / The claim is false.) are none, and a repeated sentence is counted once. Nor is an abstention (The
passages do not say whether it helps.): it speaks of the passages, which therefore cannot entail it.
"""

import re
from dataclasses import dataclass

from medistill_trl.answer_matching import LABELS, LEAD_IN

MAX_RANGE = 10  # a wider one is of values: [20-60]

# Two digits: a number of three is a value, as in sodium [135-145].
_NUMBERS = r"\d{1,2}(?:\s*(?:,|;|-|–|and|&)\s*\d{1,2})*"
CITATION = re.compile(rf"(?i:\[\s*(?:(?:passages?|evidence)\s*)?{_NUMBERS}\s*\])")

_CLOSED = r"[.!?…]+[\"')\]”’*_]*"
_STOP = re.compile(rf"{_CLOSED}(?=\s|$|\[\d)")
# With the citations that follow it, which belong to the sentence before them.
_STOP_CITED = re.compile(rf"{_CLOSED}(?:\s*{CITATION.pattern}[.,;]?)*(?=\s|$)")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the end of a sentence; those of _BEFORE_NUMBER only before a number.
_NEVER = _words(
    "e.g i.e eg ie vs cf viz approx ca dr mr mrs ms prof st sen rep gov resp incl excl esp sp spp subsp var"
)
_BEFORE_NUMBER = _words("no nos fig figs vol p pp ref refs eq tab sect ch ver")
# May end a sentence, and do so before a word that opens one. So do all of single letters: p.o., U.S.
_PERHAPS = _words(
    "etc al ph.d b.sc m.sc inc ltd jr sr hr hrs min mins sec wk wks yr yrs bid tid qid prn"
)
_OPENERS = _words(
    "a an the this that these those it its in on at for from with without by to if when while as although "
    "because since however therefore thus hence moreover furthermore also but and or so they there their he "
    "she his her we our you patients treatment most many some all both each no not yes other such after "
    "before during then overall finally"
)
_LIST_MARK = re.compile(r"^\s*(?:[-*•–—▪]\s+|\(?\d{1,2}[.)]\s+|#+\s*|>\s*)+")
_NUMBER_ALONE = re.compile(r"\(?\d{1,2}[.)]*$")
# pH, mRNA, eGFR: small at the beginning and yet the first word of a sentence.
_MIXED_CASE = re.compile(r"[a-zα-ω]{1,2}[A-Z]")
_VERDICT = re.compile(
    rf"{LEAD_IN}(?:{'|'.join(pattern for family in LABELS.values() for pattern in family.values())})"
)
_PASSAGES = (
    r"(?:(?:the|this|that|these|those|any|all|either|of|provided|given|available|numbered|above|supplied) )*"
    r"(?:evidence|passages?|texts?|excerpts?|context|documents?|sources?|information)"
    r"(?: (?:provided|given|available|above|supplied))?"
)
_SILENT = r"(?:do|does|did|is|are|can)(?: not|n['’]?t)(?: \w+ly)? (?:\w+ )?"
_SAYING = (
    r"(?:say|state|mention|specify|address|answer|discuss|tell|explain|clarify|cover|detail"
    r"|(?:enough|sufficient) to (?:answer|say|tell|determine|decide)"
    r"|(?:contain|provide|include|give|offer|have)s? (?:\w+ ){0,3}(?:information|evidence|answer|details?|data))"
)
_DECIDE = r"(?:answer|say|tell|determine|conclude|decide|know|assess|judge|confirm)"
# Of all of a sentence, so that "… do not say so, but aspirin lowers fever" is still a claim.
_ABSTENTION = re.compile(
    r"(?:(?:unfortunately|however|thus|therefore|so|overall|but|based on [^,]+|from [^,]+|according to [^,]+),? )?(?:"
    rf"{_PASSAGES} {_SILENT}{_SAYING}\b"
    rf"|(?:none|neither) of {_PASSAGES} {_SAYING}s?\b"
    rf"|(?:i|we) (?:cannot|can not|can['’]?t|could not|(?:am|are) (?:unable|not able) to) {_DECIDE}\b"
    r"|(?:i|we) (?:do not|don['’]?t) (?:know|have (?:enough|sufficient|any))\b"
    rf"|(?:it|this|the question|the answer) (?:cannot|can not|can['’]?t|could not) be (?:answered|determined|known|"
    rf"said|decided|concluded)\b"
    rf"|it is (?:not (?:clear|possible|known)|unclear|impossible)\b.* (?:from|by|in|based on|given|with) {_PASSAGES}\b"
    rf"|there is (?:no|not enough|insufficient) information\b"
    rf"|there is (?:no|not enough|insufficient) evidence (?:here |given |provided )?to {_DECIDE} (?:this|the) question"
    r")(?!.*\b(?:but|however|although|though|yet|nevertheless)\b)",
    re.I | re.S,
)
_WORDS = re.compile(r"[^\W\d_]{2,}\W(?:.*\W)?[^\W\d_]{2,}")


@dataclass(frozen=True)
class Claim:
    """One statement of an answer.

    Args:
        text: The sentence without its citations.
        citations: The numbers it cites, each once, in order; whether such passages exist is not asked here.
    """

    text: str
    citations: tuple[int, ...]


@dataclass(frozen=True)
class Claims:
    """What an answer states.

    Args:
        claims: In order.
        repeated: Sentences that say word for word what an earlier one says.
        cut: Whether the last sentence was left out, since the length limit ended it.
        abstentions: Sentences that say no more than that the passages, or the model, cannot answer.
    """

    claims: tuple[Claim, ...]
    repeated: int = 0
    cut: bool = False
    abstentions: int = 0


def claims(answer: str, finished: bool = True) -> Claims:
    """Take an answer apart.

    Args:
        answer: As the model wrote it.
        finished: False if it was cut at the length limit: then what follows the last full stop is no claim.
    """
    found: dict[str, Claim] = {}
    repeated = abstentions = 0
    parts = sentences(answer)
    cut = not finished and bool(parts) and not _ends(parts[-1])
    for sentence in parts[:-1] if cut else parts:
        claim = _claim(sentence)
        if claim is None:
            continue
        if _ABSTENTION.match(claim.text):
            abstentions += 1
            continue
        key = " ".join(claim.text.lower().split()).rstrip(".")
        repeated += key in found
        found.setdefault(key, claim)
    return Claims(tuple(found.values()), repeated, cut, abstentions)


def sentences(text: str) -> list[str]:
    """The sentences of a text, with their citations; a line ends a sentence, list marks are left out.

    A full stop within a number, after an abbreviation or an initial, or inside parentheses ends none.
    """
    found = []
    for line in text.splitlines():
        line = _LIST_MARK.sub("", line).strip()
        start = 0
        cited_first = CITATION.match(line)  # [1] It works. [2] It is safe.
        for stop in (_STOP if cited_first else _STOP_CITED).finditer(line):
            if _is_end(line, start, stop):
                found.append(line[start : stop.end()].strip())
                start = stop.end()
        found.append(line[start:].strip())
    return [_LIST_MARK.sub("", sentence) for sentence in found if sentence]


def citations(text: str) -> tuple[int, ...]:
    """The numbers in square brackets: [2], [1, 3], [1-3], [Passage 2]; each once, in order."""
    found: list[int] = []
    for match in CITATION.finditer(text):
        numbers = re.sub(r"(\d+)\s*[-–]\s*(\d+)", _spelled_out, match[0])
        found += [int(number) for number in re.findall(r"\d+", numbers)]
    return tuple(dict.fromkeys(found))


def _spelled_out(span: re.Match) -> str:
    """1-3 as 1 2 3; a span that is too wide to mean passages stays its two ends."""
    low, high = int(span[1]), int(span[2])
    wide = not low < high <= low + MAX_RANGE
    return f"{low} {high}" if wide else " ".join(map(str, range(low, high + 1)))


# --- where a sentence ends -------------------------------------------------------------------------


def _is_end(line: str, start: int, stop: re.Match) -> bool:
    """Whether a full stop ends the sentence that begins at `start`."""
    before, after = line[start : stop.start()], line[stop.end() :].lstrip()
    if not after:
        return True
    if _NUMBER_ALONE.fullmatch(before.strip()):  # "1." of a list within a line
        return False
    if before.count("(") > before.count(")") and ")" in after:
        return False
    following = re.sub(rf"^(?:{CITATION.pattern}\s*)+", "", after).lstrip("\"'“‘(*_")
    if following[:1].islower() and not _MIXED_CASE.match(following):
        return False
    return stop[0][0] != "." or _ends_word(before, following)


def _ends_word(before: str, following: str) -> bool:
    """Whether a full stop after `before` is more than the mark of an abbreviation."""
    words = before.split()
    written = words[-1].lstrip("(\"'“[") if words else ""
    if re.fullmatch(r"[A-Z]{2,}", written):  # MS and ST are none, Ms. and St. are
        return True
    word = written.lower()
    if word in _NEVER:
        return False
    if word in _BEFORE_NUMBER:
        return not following[:1].isdigit()
    opens = re.match(r"[^\W\d_]+", following)
    opener = opens is not None and opens[0].lower() in _OPENERS
    # Of a person: the study of Smith J., not vitamin D. or Hepatitis B.
    initial = len(word) == 1 and word.isalpha() and len(words) > 2 and words[-2][0].isupper()
    if initial or word in _PERHAPS or re.fullmatch(r"(?:[a-z]\.)+[a-z]", word):
        return opener
    return True


# --- what is a claim -------------------------------------------------------------------------------


def _claim(sentence: str) -> Claim | None:
    text = re.sub(r"\s+", " ", CITATION.sub("", sentence))
    text = re.sub(r"\s+([.,;:!?])", r"\1", text).strip(" *_")
    if text.endswith(("?", ":")) or not _WORDS.search(text) or _is_verdict(text):
        return None
    return Claim(text, citations(sentence))


def _is_verdict(text: str) -> bool:
    """A bare yes, no or false: what it says depends on the question, so no passage can entail it."""
    return _VERDICT.fullmatch(" ".join(re.findall(r"[a-z]+", text.lower()))) is not None


def _ends(sentence: str) -> bool:
    return re.search(r"[.!?…][\"')\]”’*_]*$", CITATION.sub("", sentence).rstrip()) is not None
