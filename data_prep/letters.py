"""The gate against option letters: a long-form question has no options, so no letter may point at one.

Medicine is full of single letters (vitamin A, hepatitis B, Lp(a), group A streptococcus), so a letter
counts as a leak only in the shapes that exams and their answer keys use.
"""

import re

# "A" before a lower-case word or a number is an article: "Answer: A 45-year-old man".
LETTER = r"(?:[B-Eb-e]\b(?!['’]s|-)|[Aa]\b(?!['’]s|-|\s+(?!is\b|are\b|was\b|and\b|or\b|can\b|stands\b)[a-z0-9]))"
# The start of a word, also of one glued to the word before it: "CarbamazepineBoth A and B".
START = r"(?:\b|(?<=[a-z])(?=[A-Z])|(?<=[A-E])(?=[A-Z][a-z]))"
# Not the letter of a name: vitamin C, hepatitis B, protein C, factor V, group A, the vitamins A and C.
NAMES = (
    "itamin",
    "itamins",
    "Vit",
    "atitis",
    "actor",
    "rotein",
    "roup",
    "roups",
    "ype",
    "ypes",
    "luenza",
    "virus",
    "philia",
)
NAMES += (
    "lass",
    "rade",
    "tage",
    "kinase",
    "lobulin",
    "lipase",
    "globin",
    "complement",
    "poprotein",
    "the",
    "and",
)
UNNAMED = r"(?=[A-Ea-e][\s,&])(?<![\w/>–-])" + "".join(f"(?<!{name} )" for name in NAMES)
JUDGED = r"(?:answer|correct|incorrect|true|untrue|false|right|wrong|key)\b(?!-)"
JUDGEMENTS = ("answer", "correct", "true", "false", "right", "wrong", "key")
QUOTES = ("'", '"', "‘", "“")

# Each shape with words of which one must occur, in lower case: looking for those first is ten times faster.
LEAKS = [
    (needles, re.compile(pattern))
    for needles, pattern in (
        # Option A, choice (b), options 2 and 3, Alternative C
        (
            ("option", "choice", "alternative", "distractor"),
            rf"{START}(?i:(?:options?|choices?|alternatives?|distractors?))\b\s*(?:no\.?|number)?[-:.#]?\s*['‘\"“(\[]?"
            r"(?:[A-Ea-e]\b(?!['’]s|-)|[1-5]\b(?!\s*(?:mg|ml|g|%|years?|weeks?|days?|months?|hours?|\.\d|-)))",
        ),
        # optionB, Opt. B, letter B
        (
            ("opt", "choice", "letter"),
            r"(?:[Oo]ptions?|[Cc]hoices?)[A-Ea-e]\b|[Oo]pts?(?:\s*[.:-]\s*['‘\"“(\[]?[A-Ea-e1-5]\b|\s+['‘\"“(\[]?[B-E]\b)"
            rf"|[Ll]etters?\s+['‘\"“(\[]?{LETTER}",
        ),
        # Ans. (b), Ans: D. Odorants, Answer- B, answer is 'c'
        (
            ("ans",),
            rf"{START}(?i:(?:ans|answers?))\b[\s.:=–—-]*(?i:(?:is|key|would be)\b)?[\s.:=–—-]*"
            rf"(?:['‘\"“(\[][A-Ea-e1-5]['’\"”)\]]|{LETTER}(?=[\s.:(),;\]'’\"”–-]|$)|[1-5](?=[.):]?(?:\s*\Z|\s*\n|\s*[A-Z(\[]|[,;])|[.):]\D))",
        ),
        (("ans",), r"\b[Aa]ns\s*[.:–-]"),
        # Correct: C; the key is D
        (
            ("correct", "key", "right"),
            r"(?i:\b(?:correct|key|right)\b)(?i:\s+(?:one|letter))?(?i:\s+is|\s*[:=])\s*['‘\"“(]?"
            r"[A-E]\b(?!\s+[a-z0-9]|-)",
        ),
        # Key: b; Sol: B; Solution- (c)
        (
            ("key", "sol"),
            rf"(?=[KSks]){START}(?i:(?:key|sol|soln|solution)\b)\s*[.:=–-]+\s*['‘\"“(\[]?[A-Ea-e1-5]['’\"”)\]]?(?=\s*(?:[.,;:]\D|[.,;:]?\s*\Z|\n)|\s+[A-Z])",
        ),
        # Hence C. Therefore, (b); i.e., B (but hence E. coli)
        (
            ("hence", "therefore", "thus", "so ", "so,", " ie", "i.e", "i. e"),
            r"(?:[Hh]ence|[Tt]herefore|[Tt]hus|[Ss]o(?<!also)(?<!Also)|[Ii]\.?\s?e\.?)[\s,:–-]+['‘\"“(\[]?[A-Ea-e]['’\"”)\]]?"
            r"(?=\s*(?:\Z|[;!?\n)]|\.(?!\s?(?!ans|opt|i\.e)[a-z]|[A-Z]\.)|,?\s+(?:as|because|since)\b))",
        ),
        # [B]
        (("[",), r"(?<!\])\[[A-Ea-e]\](?![\w\[-])"),
        # A text that opens "B i.e."; the letter alone in quotation marks
        (("ie", "i.e", "i. e"), r"\A\W*[A-Ea-e]\W{0,3}\s*i\.?\s?e\b"),
        (QUOTES, r"['‘\"“][a-eA-E]['’\"”](?!\s*-?\s*(?:waves?|cells?|symptoms?)\b)"),
        # Both A and B, only C, neither A nor B
        (
            ("both", "only", "neither", "either", "none of", "all of", "any of"),
            rf"(?=[BONEAbonea]){START}(?i:(?:both|only|neither|either|(?:none|all|any)\s+of))\s+[A-Ea-e]\s*(?:and|&|or|nor|,|/)\s*[A-Ea-e]\b"
            r"(?!\s*-?\s*(?:cells?|fib|vir))",
        ),
        # a,b,d ruled out; B and C are wrong
        (
            ("option", "ruled", "correct", "wrong", "true", "false", "right", "excluded"),
            rf"{UNNAMED}(?<!\()(?:[A-E](?:\s*(?:,|&|and)\s*[A-E])+|[a-e](?:\s*(?:,|&|and)\s*[a-e])+)\s+"
            r"(?:options?\b|ruled\b"
            r"|(?:is|are)\s+(?:also\s+)?(?:not\s+)?(?:correct|incorrect|wrong|true|false|right|ruled|excluded))",
        ),
        # A is not wrong, c is the answer, B stands correct; C correct. (but vitamin A is wrong)
        (
            JUDGEMENTS,
            rf"{UNNAMED}[A-Ea-e]\s+(?:(?:is|are|was|stands)\s+(?:(?:not|also|the|thus|therefore|clearly|only|most|best)\s+)*{JUDGED}"
            rf"|{JUDGED}(?=\s*(?:[.,;:!\n]|\Z)))",
        ),
        # A. Working mother (but E. coli, C. trachomatis, A.S.D.); d - Small doses
        ((), r"(?:\A|\n)\s*[A-Ea-e](?:[.:]\s+(?=[A-Z0-9])|[.:](?=[A-Z][a-z]))"),
        # It blocks channels. d. Because …; It blocks channels. D.
        (
            (". ", "? ", "! "),
            r"[.!?]\s(?:[A-Ea-e]\W*\Z|[a-e]\.\s+(?=[A-Z][a-z])|[B-E]\.\s+(?=(?:Because|As|Since|It|The|This|These)\b))",
        ),
        ((" - ", " – "), r"(?:(?<=\s)|\A)[a-e]\s[-–]\s(?=[A-Z])"),
        (
            ("similar to", "same as", "as in", "combination of", "except"),
            r"(?i:\b(?:similar to|same as|as in|combination of|except))\s+[A-E](?=\s*(?:but|and\s+[A-E]\b|[.,;]|\Z))",
        ),
        (("above",), r"(?i:\b(?:all|none|any|both)(?:\s+of)?(?:\s+the)?\s+above\b)(?!\s+the\b)"),
    )
]
MARKER = re.compile(r"(?<![\w)\]])(\()?[A-Ea-e]\)(?!\s*(?:-\s*)?(?:waves?|cells?)\b)")


def find_letter_leak(text: str) -> str | None:
    """The first piece of `text` that points at an option by its letter or number, or None.

    Args:
        text: A question, a reference or an answer.
    """
    lowered = text.lower()
    for needles, pattern in LEAKS:
        if needles and not any(map(lowered.__contains__, needles)):
            continue
        if match := pattern.search(text):
            return match.group()
    if ")" not in text:
        return None
    for match in MARKER.finditer(text):
        if match[1] or not _inside_parentheses(text, match.start()):
            return match.group()
    return None


def _inside_parentheses(text: str, position: int) -> bool:
    """Whether a parenthesis opened shortly before is still open: "(hepatitis A and B)"."""
    before = text[max(0, position - 120) : position]
    return before.rfind("(") > before.rfind(")")
