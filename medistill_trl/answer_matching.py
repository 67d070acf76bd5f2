"""Is a short final answer the reference answer, and do two answers say the same? Text rules, no model.

A reference is a label (yes/no/maybe; true/false/mixture/unproven), an option letter, or free text. A label or a
letter is looked for where an answer states it; free text must be equal, or stand whole in the answer,
after both are normalised. In doubt the rules say no: a right answer passed over costs one rationale, a
wrong one let in teaches a mistake.
"""

import re
import unicodedata
from collections.abc import Iterator

# Families of labels; the patterns are for text that `_plain` has made, the wider ones first.
LABELS = {
    "decision": {
        "maybe": r"maybe|perhaps|uncertain|unclear|inconclusive",
        "yes": r"yes",
        "no": r"no",
    },
    "claim": {
        "mixture": r"mixture|mixed|(?:partly|partially|half) (?:true|false)"
        r"|(?:both )?(?:true and false|false and true)",
        "unproven": r"unproven|unproved|unverified|not (?:yet )?(?:proven|proved)",
        "true": r"true",
        "false": r"false",
    },
}
# What may stand before a label without changing what is said.
LEAD_IN = r"(?:(?:the|this|that|it|is|a|final|correct|right|best|claim|statement|answer|verdict|label|rated) )*"
DENIALS = {"not", "isnt", "never", "neither", "nor", "cannot"}
NUMBERS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
    # Roman ones of more than one letter: "i", "v" and "x" are too often something else.
    "ii": "2", "iii": "3", "iv": "4", "vi": "6", "vii": "7", "viii": "8", "ix": "9", "xi": "11", "xii": "12",
}  # fmt: skip
GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "κ": "kappa", "λ": "lambda",
    "μ": "mu", "σ": "sigma", "ω": "omega",
}  # fmt: skip
EDGE = "|"
PUNCTUATION = re.compile(r"[;:()\[\]!?\n\"“”|]|[.,](?=\s|$)|\s[-–—]+\s")  # not that of 0.5 and 45,X
# Numbers with their decimals, words, comparisons, signs before a number or after a name (HER2-), edges.
TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[<>≤≥|]|\+|(?<!\w)-(?=\d)|(?<=\w)-(?!\w)")
LETTER_REFERENCE = re.compile(
    r"\(?(?P<alone>[A-J])[).:]?"
    r"|\((?P<enclosed>[A-J])\)\s+(?P<enclosed_text>.+)"
    # A small letter after the point is a species: E. coli.
    r"|(?P<open>[A-J])(?:[):]\s+|\.\s+(?![a-z]))(?P<open_text>.+)"
)
MORE_WORDS = 12  # than the reference has: past that an answer is a text, not an answer


def matches(answer: str, reference: str) -> bool:
    """Does a final answer say what the reference says?

    Args:
        answer: A few words: `B`, `(B)`, `B. Radial nerve`, `Yes, it does.`, `The radial nerve.`
        reference: `B`, `yes`, `mixture`, `Radial nerve`.
    """
    family = _family(reference)
    if family is not None:
        return _label(answer, family) == _plain(reference)
    found = LETTER_REFERENCE.fullmatch(reference.strip())
    if found is None:
        return _says(answer, reference)
    given = _letter(answer, strict=False)
    if given is not None:
        return given in (found["alone"], found["enclosed"], found["open"])
    text = found["enclosed_text"] or found["open_text"]
    return text is not None and _says(answer, text)


def answer_key(answer: str, reference: str | None = None) -> str:
    """What a final answer says, alike for answers that say the same: for votes and contradictions.

    Args:
        reference: The right answer where there is one: whatever matches it gets its key.
    """
    if reference is not None and matches(answer, reference):
        return _joined(reference)
    families = LABELS if reference is None else [_family(reference)]
    for family in filter(None, families):
        if (label := _label(answer, family, leading=reference is None)) is not None:
            return label
    letter = _letter(answer, strict=True)
    return _joined(answer) if letter is None else letter.lower()


def normalised(text: str) -> tuple[list[str], set[int]]:
    """The words of a text without case, accents, articles, plurals and spelling variants.

    Returns:
        The words, and the places among them where a phrase begins or ends by punctuation.
    """
    tokens = _tokens(text)
    words, edges = [], {0}
    for place, token in enumerate(tokens):
        # A capital or a last "a" is a name: vitamin A, hepatitis A virus.
        article = token.lower() in ("the", "an") or (token == "a" and place + 1 < len(tokens))
        if token == EDGE:
            edges.add(len(words))
        elif not article:
            words.append(_stem(token.lower()))
    return words, edges | {len(words)}


def _tokens(text: str) -> list[str]:
    """Words, signs and `EDGE`s, as they are written but for accents, apostrophes and Greek letters."""
    text = unicodedata.normalize("NFKD", text).replace("\N{MINUS SIGN}", "-")
    text = "".join(c for c in text if not unicodedata.combining(c) and c not in "'’`*")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = PUNCTUATION.sub(f" {EDGE} ", text)
    return TOKEN.findall("".join(f" {GREEK[c]} " if c in GREEK else c for c in text))


def _stem(word: str) -> str:
    """One form for singular and plural, for a number and its word, for British and American spelling."""
    word = re.sub(r"ae|oe", "e", NUMBERS.get(word, word))
    word = re.sub(r"our(?=s?$)", "or", word)
    if len(word) <= 3:
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(?:s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if re.search(r"[^siu]s$", word) else word


def _joined(text: str) -> str:
    """Normalised words without blanks: "non-contrast" is "noncontrast". Punctuation alone stays itself."""
    return "".join(normalised(text)[0]) or text.strip().casefold()


def _plain(text: str) -> str:
    """Lower-case words with single blanks."""
    return " ".join(token for token in _tokens(text) if token != EDGE).lower()


# --- labels and letters ----------------------------------------------------------------------------


def _family(reference: str) -> str | None:
    """The family of labels the reference is of."""
    word = _plain(reference)
    return next((name for name, labels in LABELS.items() if word in labels), None)


def _label(answer: str, family: str, leading: bool = False) -> str | None:
    """The label an answer begins with, else the one it ends with, unless denied; None if it offers two.

    Args:
        leading: Only the one it begins with.
    """
    text, labels = _plain(answer), LABELS[family]
    for label, pattern in labels.items():
        if found := re.match(rf"{LEAD_IN}(?:{pattern})\b", text):
            others = "|".join(labels[other] for other in labels if other != label)
            two = re.match(rf" (?:or|and) (?:{others})\b", text[found.end() :])
            return None if two else label
    if leading:
        return None
    for label, pattern in labels.items():
        found = re.search(rf"\b(?:{pattern})$", text)
        if found and not DENIALS & set(text[: found.start()].split()[-2:]):
            return label
    return None


def _letter(answer: str, strict: bool) -> str | None:
    """The option letter an answer begins with, as in `B`, `(b)`, `B) text`, `Answer: B`; not `B and C`.

    Args:
        strict: Not in `E. coli`, where a small letter follows the point.
    """
    text = answer.strip().strip("*_ ")
    if re.fullmatch(r"[(\[]?[a-j][)\].]?", text):
        return text.strip("()[].").upper()
    lead = r"(?i:(?:the|final|correct|right|best|answer|option|choice|letter|is)\b[\s:*]*)*"
    after_point = r"\s*(?:$|[^a-z\s])" if strict else r"(?:\s|$)"
    end = rf"(?=\s*$|\s*[):\]]|\.{after_point}|,\s|\s+[-–—(])"
    found = re.match(rf"{lead}[(\[]?([A-J])\b{end}", text)
    if found is None:
        return None
    another = re.match(r"[)\].\s]*(?:[,/&]|and\b|or\b)\s*\(?[A-J]\b", text[found.end(1) :])
    return None if another else found[1]


# --- free text -------------------------------------------------------------------------------------


def _stems(words: str) -> frozenset[str]:
    return frozenset(map(_stem, words.split()))


NEGATIONS = _stems(
    "not no non never neither nor without cannot cant isnt arent wasnt doesnt dont unlikely except "
    "excluding rather instead exclude excluded absence lack"
)
# Words beside which a phrase is still itself. Any other may change it: portal hypertension.
BRIDGES = _stems(
    "is are was were be due to of by with because from in on as for which that this it likely most "
    "probably called via through answer diagnosis indicates suggests means"
)
DENIED_AFTER = re.compile(
    r"(?:\w+ )?(?:is|are|was|were|can|could|should|would|seem|appear) (?:\w+ )?"
    r"(?:not|unlikely|excluded|wrong|incorrect|false)\b|(?:isnt|arent|wasnt|cannot|cant)\b"
)


def _says(answer: str, reference: str) -> bool:
    """Equal, or the whole reference in a short answer that neither denies it nor offers another."""
    wanted, (given, edges) = normalised(reference)[0], normalised(answer)
    if not wanted:
        return answer.strip().casefold() == reference.strip().casefold()
    whole = "".join(wanted)
    if "".join(given) == whole:
        return True
    if len(given) > len(wanted) + MORE_WORDS:
        return False
    for start, stop in _spans(given, whole):
        before, after = given[:start], given[stop:]
        apart = (start in edges or before[-1] in BRIDGES) and (stop in edges or after[0] in BRIDGES)
        denied = NEGATIONS & set(before) or DENIED_AFTER.match(" ".join(after))
        offers_another = {"or", "versus", "either"} & {*before, *after}
        if apart and not denied and not offers_another:
            return True
    return False


def _spans(words: list[str], whole: str) -> Iterator[tuple[int, int]]:
    """Runs of words that make up `whole` when joined."""
    for start in range(len(words)):
        joined = ""
        for stop in range(start, len(words)):
            joined += words[stop]
            if joined == whole:
                yield start, stop + 1
            if not whole.startswith(joined):
                break
