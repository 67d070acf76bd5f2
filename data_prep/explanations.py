"""Cleaning a dataset's explanation: no answer keys, no option letters, no page references.

MedMCQA's explanations are scanned answer books. Many open with the key ("Ans. (b) Odorants", often with
no blank before the text) and cite a page; some argue by letter. What is about letters goes, sentence by
sentence; the medicine stays as it is written.
"""

import itertools
import re

from data_prep.letters import find_letter_leak

KEY = re.compile(
    r"\A\W*(?:(?:correct\s+|the\s+)*(?:ans(?:wer)?s?|correct\s+option)\b(?:\s+key)?(?:\s+is)?[\s.:=,–—-]*(?:option\s+)?"
    r"(?:['‘\"“(\[]+\s*[A-Ea-e1-5]\s*['’\"”)\]]+|(?:[A-Ea-e]|[1-5](?=[.):]\D|[.):]?\s*(?:\Z|\n|(?-i:[A-Z]))))(?=[\s.:),;\]'’\"”–-]|\Z))?"
    r"|['‘\"“(\[]?[A-Ea-e]['’\"”)\]]?\W{0,3}(?=i\.?\s?e\b)|[(\[]?[A-Ea-e][.)\]]\s*(?=[A-Z0-9]))"
    r"[\s.:)\]'’\"”,–-]*(?:i\.?\s?e\b[.,\s]*)?",
    re.I,
)
HAS_KEY_WORD = re.compile(r"\A\W*(?:correct\s+|the\s+)*(?:ans|correct\s+option)", re.I)
ARTICLE = re.compile(r"\A\W*(?:the\s+)?(?:ans(?:wer)?)\b[\s.:–-]*(?-i:A\s+[a-z0-9])", re.I)
EXPLANATION_WORD = re.compile(r"\A[\s.:]*(?:Explanation|Exp|Solutions?)\s*[.:-]+\s*", re.I)
EDITION = r"\d+\s*(?:th|st|nd|rd)?\s*(?:/?\s*e(?:d(?:n|ition)?)?\b)"
REFERENCE_NOTES = [
    re.compile(r"\(?\bR[eco][fJ]i?(?:erences?)?\b\s*[.:]?[^()\n]{0,240}\)"),
    re.compile(r"\([^()\n]{0,120}(?:\d+(?:th|st|nd|rd)?\s?/\s?e\b|[Ee]dition\b|\bpp?\.?\s?\d{2,})[^()\n]{0,160}\)"),
    re.compile(r"(?:(?<=[\s.;,)\]])|\A)R[eco][fJ]i?(?:erences?)?\b\s*[.:-]?[^\n]{0,140}?\b(?:pp?|pg|[Pp]ages?(?:\s+no)?)\s*[.:]*\s*\d+(?:\s*[-–,&]\s*\d+)*\.?"),
    re.compile(r"(?:(?<=[\s.;,)\]])|\A)(?:Ref(?:erences?)?|Refi|ReJ|Rcf)\b\s*[.:-]?[^\n]{0,160}(?=\n|\Z)"),
    re.compile(r"\(?\bh?t?t?[it]?ps?:/+\S+"),
]  # fmt: skip
MARKER = re.compile(r"(?<![\w)\]])\(?[A-Ha-h]\)\s*")
FIRST_MARKER, SECOND_MARKER = (re.compile(rf"(?<![\w)\]])\(?{x}\)", re.I) for x in "ab")
# "(b) is wrong", "both (a) and (c)": the marker is a part of the sentence, not of a list.
POINTING = re.compile(
    r"(?:(?<![\w)\]])\(|\A)[A-Ha-h]\)\s*(?:(?:is|are|was|has|can|and|or|nor|but|both|only|alone|stands)\b|[,&./]|\Z)"
    r"|\b(?:both|only|neither|either|hence|therefore)\s+\(?[A-Ha-h]\)",
    re.I,
)
LINE_LETTER = re.compile(r"(?m)(?:^\s*[A-Ha-h]|(?<=[.!?] )[a-e])\.\s+(?=[A-Z])")
GLUED_SENTENCES = re.compile(r"(?<=[a-z)]{2}\.)(?=[A-Z][a-z])")
SENTENCES = re.compile(
    r"(?<=[.!?])(?<!\bans\.)(?<!Ans\.)(?<!\bopt\.)(?<!Opt\.)(?<!Sol\.)(?<!i\.e\.)[ \t]+(?=[A-Z\"“(*'\[])|\n+"
)
ABOUT_THE_EXAM = re.compile(
    r"\bRef(?:i|s|erences?)?\b\s*[.:]|\bRefi\b"
    r"|\b(?:in|of) (?:this|the(?: above| given)?) (?:question|mcq)\b|\bkey concept\s*:|\bbest (?:option|answer|choice) (?:is|would|among|here)\b"
    r"|\b(?:the|given|above|all|other|these|following|provided|remaining|an|any|four|as) (?:\w+ )?(?<!treatment )(?<!therapeutic )(?<!management )(?<!surgical )(?:options?|choices)\b(?! (?:for|of|to|in) (?:the )?(?:treat|manag|ther|patient))"
    r"|\bruled? out options?\b|\brules out option\b|\bby exclusion\b|\b(?:our|best|correct|right) answer\b|\banswer (?:is|here|would)\b"
    r"|\b(?:figure|fig|image|picture|diagram|photograph)s?\b\.?\s*(?:\(|\d|shows?\b|above\b|below\b|given\b)",
    re.I,
)
_NOT_WORD = re.compile(r"[\W_]+")
OPTION = re.compile(
    r"(?i:\boption|\bchoice)\s*['\"(]?([A-Ea-e])['\")]?(?=\s+(?:is|was|has|causes|can|does)\b)(?!\s+(?i:(?:is\s+)?(?:not\s+)?(?:in)?correct|is\s+wrong|is\s+(?:true|false|right)))"
)


def clean_explanation(explanation: str, answer: str, options: tuple[str, ...] = ()) -> str:
    """The explanation without option letters, answer keys and references; empty if nothing is left.

    Args:
        explanation: As the dataset has it.
        answer: The gold answer, cut off where the explanation opens by repeating it.
        options: Texts of the options in the dataset's order, to put in place of "Option B".
    """
    text = explanation.replace("\xa0", " ").replace("\r", "").strip()
    if not text:
        return ""
    text = _cut_key(text, answer)
    for note in REFERENCE_NOTES:
        text = note.sub(" ", text)
    text = EXPLANATION_WORD.sub("", text.lstrip(" .:;,"))
    if ")" in text:
        text = "".join(piece for piece in _pieces(text) if not POINTING.search(piece.strip()))
    if (first := FIRST_MARKER.search(text)) and SECOND_MARKER.search(text, first.end()):
        text = MARKER.sub(" ", text)
    text = LINE_LETTER.sub("", text)
    text = GLUED_SENTENCES.sub(" ", text)
    kept = [_repair(piece, options) for piece in _pieces(text)]
    text = re.sub(r"[ \t]{2,}", " ", "".join(kept))
    text = re.sub(r"\s+([.,;])(?=\s|\Z)", r"\1", text).strip().lstrip(".,:;)]- ").strip()
    if not re.search(r"\w{2}", text) or _same(text, answer):
        return ""
    return text if text.endswith((".", "!", "?", ":", '"', "”", ")", "…")) else text + "."


def clean_conclusion(conclusion: str) -> str:
    """The conclusion of an abstract or a fact check: only the markers of its own lists are removed."""
    text = conclusion.replace("\xa0", " ").strip()
    if not find_letter_leak(text):
        return text
    text = re.sub(r"[ \t]{2,}", " ", MARKER.sub(" ", text)).strip()
    if not find_letter_leak(text):
        return text
    return "".join(piece for piece in _pieces(text) if not find_letter_leak(piece.strip())).strip()


def _cut_key(text: str, answer: str) -> str:
    """Without "Ans. (b)" and the answer restated behind it, even where no blank follows it."""
    match = KEY.match(text)
    rest = text
    if match and match.end() and not ARTICLE.match(text):
        if not HAS_KEY_WORD.match(text) and not _after(text[match.end() :], answer):
            return text
        rest = text[match.end() :]
    elif not match or ARTICLE.match(text):
        return text
    end = _after(rest, answer)
    if end is None:
        return rest
    # A first sentence that goes on after the answer ("Bloom syndrome is not …") needs its subject.
    remainder = rest[end:]
    if re.match(r"\s+[a-z]", remainder):
        return rest
    remainder = remainder.lstrip(" .:;,)]*-–\n")
    return (
        remainder[1:]
        if re.match(r"['\"][A-Z]", remainder) and remainder.count(remainder[0]) == 1
        else remainder
    )


def _after(text: str, answer: str) -> int | None:
    """Where the text goes on after the answer it opens with; blanks, case and marks do not count."""
    wanted = [c.lower() for c in answer if c.isalnum()]
    found = 0
    for i, char in enumerate(text[: 2 * len(answer) + 20]):
        if found == len(wanted):
            return i
        if char.isalnum():
            if char.lower() != wanted[found]:
                break
            found += 1
    else:
        if wanted and found == len(wanted):
            return min(len(text), 2 * len(answer) + 20)
    return _after_similar(text, answer)


def _after_similar(text: str, answer: str) -> int | None:
    """The same for an answer restated in slightly other words: up to the glued capital behind it."""
    words = {word.lower() for word in re.findall(r"\w{3,}", answer)}
    if len(words) < 2:
        return None
    low = max(4, int(len(answer) * 0.7))
    glued = re.search(r"(?<=[a-z0-9)])(?=[A-Z(][a-z])", text[low : int(len(answer) * 1.4) + 6])
    if not glued:
        return None
    restated = {word.lower() for word in re.findall(r"\w{3,}", text[: low + glued.start()])}
    return low + glued.start() if len(words & restated) >= 0.6 * len(words) else None


def _pieces(text: str) -> list[str]:
    """The sentences and lines with the blanks behind them."""
    cuts = [0, *(match.end() for match in SENTENCES.finditer(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts) if a < b]


def _repair(piece: str, options: tuple[str, ...]) -> str:
    """The sentence with "Option B" replaced by the option, or nothing if it still speaks of letters."""

    def text_of(match: re.Match) -> str:
        place = "abcde".index(match[1].lower())
        known = options[place].rstrip(" .") if place < len(options) else ""
        return known if 2 < len(known) < 60 else match.group()

    repaired = OPTION.sub(text_of, piece) if "ption" in piece or "hoice" in piece else piece
    alone = re.fullmatch(r"\W*[A-Ea-e]\W*", repaired)
    if alone or find_letter_leak(repaired.strip()) or ABOUT_THE_EXAM.search(repaired):
        return "\n" if piece.endswith("\n") else ""
    return repaired


def _same(text: str, answer: str) -> bool:
    return _NOT_WORD.sub("", text).lower() == _NOT_WORD.sub("", answer).lower()
