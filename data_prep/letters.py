"""The gate against option letters: a long-form question has no options, so no letter may point at one.

Medicine is full of single letters (vitamin A, hepatitis B, Lp(a), group A streptococcus), so a letter
counts as a leak only in the shapes that exams and their answer keys use.
"""

import re

# "A" before a lower-case word or a number is an article: "Answer: A 45-year-old man", "option a patient has".
LETTER = (
    r"(?:[B-Eb-e]\b(?!['’]s|-)|[Aa]\b(?!['’]s|-|\s+(?!is\b|are\b|was\b|and\b|or\b|can\b)[a-z0-9]))"
)
# Words whose letter is a name.
NAMED = (
    "hepatitis|vitamins?|types?|groups?|factors?|influenza|class|classes|proteins?|stages?|grades?"
    "|strains?|chains?|subunits?|blood|drugs?|twins?|patients?|serotypes?|toxins?|antigens?|HLA"
)

LEAKS = [
    re.compile(pattern)
    for pattern in (
        # Option A, choice (b), options 2 and 3, Alternative C
        rf"(?i:\b(?:options?|choices?|alternatives?|distractors?))\b\s*(?:no\.?|number)?[-:.#]?\s*['‘\"“(\[]?"
        rf"(?:{LETTER}|[1-5]\b(?!\s*(?:mg|ml|g|%|years?|weeks?|days?|months?|hours?|\.\d|-)))",
        # Ans. (b), Ans: D. Odorants, Answer- B, answer is 'c'
        rf"(?i:\b(?:ans|answers?))\b[\s.:=–—-]*(?i:(?:is|key|would be)\b)?[\s.:=–—-]*"
        rf"(?:['‘\"“(\[][A-Ea-e1-5]['’\"”)\]]|{LETTER}(?=[\s.:),;\]'’\"”–-]|$)|[1-5](?=[.):]\D))",
        r"\b[Aa]ns\s*[.:–-]",
        # Correct: C; the key is D
        r"(?i:\b(?:correct|key|right)\b)(?i:\s+(?:one|letter))?(?i:\s+is|\s*[:=])\s*['‘\"“(]?[A-E]\b(?!\s+[a-z0-9]|-)",
        # is 'c' i.e. …, and a text that opens "B i.e."
        r"\A\W*[A-Ea-e]\W{0,3}\s*i\.?\s?e\b",
        r"['‘\"“][a-eA-E]['’\"”](?!\s*-?\s*(?:waves?|cells?|symptoms?)\b)",
        # Both A and B, only C, neither A nor B
        r"(?i:\b(?:both|only|neither|either))\s+[A-E]\s*(?:and|&|or|nor|,|/)\s*[A-E]\b(?!\s*-?\s*(?:cells?|fib|vir))",
        # a,b,d ruled out; B and C are wrong
        r"(?<!\w)(?<![-/(>])(?<!the )\b(?:[A-E](?:\s*(?:,|&|and)\s*[A-E])+|[a-e](?:\s*(?:,|&|and)\s*[a-e])+)\s+"
        r"(?:options?\b|ruled\b|(?:is|are)\s+(?:also\s+)?(?:not\s+)?(?:correct|incorrect|wrong|true|false|right|ruled|excluded))",
        # A is wrong; D: incorrect
        r"(?<!\w)(?<![-/])(?<!(?:itamin|atitis|factor) )(?:[B-E]|A)\s+is\s+(?:the\s+)?(?:correct|incorrect|wrong|right|false)\b",
        # A. Working mother (but E. coli, C. trachomatis), d - Small doses
        r"(?:\A|\n)\s*[A-Ea-e][.:]\s*(?=[A-Z0-9])",
        r"(?:(?<=\s)|\A)[a-e]\s[-–]\s(?=[A-Z])",
        r"(?i:\b(?:similar to|same as|as in|combination of|except))\s+[A-E](?=\s*(?:but|and\s+[A-E]\b|[.,;]|\Z))",
        r"(?i:\ball|\bnone|\bany|\bboth)(?i:\s+of)?(?i:\s+the)?\s+above\b",
    )
]
MARKER = re.compile(r"(?<![\w)\]])(\()?[A-Ea-e]\)(?!\s*(?:-\s*)?(?:waves?|cells?)\b)")


def find_letter_leak(text: str) -> str | None:
    """The first piece of `text` that points at an option by its letter or number, or None.

    Args:
        text: A question, a reference or an answer.
    """
    for pattern in LEAKS:
        if match := pattern.search(text):
            return match.group()
    for match in MARKER.finditer(text):
        if match[1] or not _inside_parentheses(text, match.start()):
            return match.group()
    return None


def _inside_parentheses(text: str, position: int) -> bool:
    """Whether a parenthesis opened shortly before is still open: "(hepatitis A and B)"."""
    before = text[max(0, position - 120) : position]
    return before.rfind("(") > before.rfind(")")
