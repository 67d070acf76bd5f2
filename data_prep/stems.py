"""Rewriting the stem of a multiple-choice question so that it stands without its options.

A stem is a case (the vignette, left as it is) and its last sentence, the part that asks. Only that part
is rewritten: "Which of the following drugs is …" becomes "Which drug is …". Where the answer depends on
what was offered ("all of these except"), the stem says so and the options are stated after it.
"""

import re
from dataclasses import dataclass

from data_prep.nouns import noun_phrase, singular_phrase, stands_for_noun


@dataclass(frozen=True)
class Stem:
    """The parts of a question.

    Args:
        case: What comes before the asking sentence, with its trailing blank; may be empty.
        text: The asking sentence, rewritten.
        form: "question", "statement" (unfinished), "phrase" (elliptic) or "exception".
        needs_options: It has a clear answer only beside the options.
    """

    case: str
    text: str
    form: str
    needs_options: bool


FOLLOWING = r"(?:f[ou]l+[ou]wing?|foUowing|foiling|listed|given|below)"
WHICH = re.compile(
    rf"\b(?:[Ww]?hich|WHICH|[Ww]hat)(?:\s+one)?\s+(?:of|among|amongst|from)\s+(?:the\s+)*{FOLLOWING}\b"
    r"(?:\s+(?:ones?|options|choices|answers|answer\s+choices)\b)?,?"
)
OF_THE_FOLLOWING = re.compile(
    rf"^(?:(?:of|among|amongst|from|given)\s+the\s+{FOLLOWING}(?:\s+(?:options|choices|answers))?\s*,\s*)",
    re.I,
)
AMONG = re.compile(
    rf",?\s+(?:among|amongst|from|out of)\s+(?:the\s+)?{FOLLOWING}\b(?=\s+(?:is|are|for|in)\b|\W*$)"
)
ENDS_IN_THE_FOLLOWING = re.compile(rf"\bthe\s+{FOLLOWING}\s+((?:[\w-]+\s+)?[\w-]+)\s*$", re.I)
STARTS_WITH_FOLLOWING = re.compile(
    rf"^(?:the\s+|one\s+of\s+the\s+)?{FOLLOWING}\s+((?:[\w-]+\s+){{0,3}}?)(?=(?:is|are|does|do|can|causes?|stands?)\b)",
    re.I,
)
LEFT_HANGING = re.compile(
    rf"\b(?:of (?:the|one of the) {FOLLOWING}\b(?=\s+\w)|(?:one of )?(?:the )?{FOLLOWING}(?=\W*$))",
    re.I,
)
WHAT_DESCRIBE = re.compile(r"(\bwhat (?:\w+ )?(?:describe|explain|represent|characterize))\b", re.I)
THE_FOLLOWING_IS = re.compile(rf"\bthe {FOLLOWING} (is|are)\b", re.I)
# "expect" at the end of "all of these are true expect" is a slip; "would you expect" is not.
EXCEPT = re.compile(
    r"(?<!you )(?<!we )(?<!to )(?<!also )(?<!would )\b(?:except|expect|eicept|exept|e\\cept|ecxept|A/E)\b(?:\s+one)?[\s:;.,?–(-]*$",
    re.I,
)
NEGATED = re.compile(
    r"\b(?:not|false|incorrect|wrong|untrue|inaccurate|faulty|(?<!at )least|odd one|cannot|unlikely)\b|n[’']t\b",
    re.I,
)
TRUE = re.compile(
    r"\b(?:statements?|pairs?|pairings?|combinations?|assertions?)\b"
    r"|\b(?:is|are|stands?)\s+(?:also\s+|most\s+)*(?:true|correct|accurate)\b"
    r"|^(?:true|false|correct|right|accurate)\b|\b(?:true|correct)\s+(?:is|are|about|regarding|of|for)\b",
    re.I,
)
TRUE_ABOUT = re.compile(
    r"^(?:(?:what|which|find)\s+(?:(?:is|are)\s+)?)?(?:the\s+)?(not\s+(?:true|correct)|true|false|wrong|incorrect|correct|faulty|untrue)"
    r"(?:\s+statements?)?(?:\s+among\s+(?:the\s+)?following)?\s+(about|regarding|of|for|concerning)\s+(.+?)"
    r"(?:\s+(?:is|are|is/are|includes?))?\s*$",
    re.I | re.S,
)
TRUE_ALL = re.compile(
    r"^(?:true|correct)(?:\s+statements?)?\s+(about|regarding|of|for)\s+(.+?)"
    r"(?:,?\s*(?:is|are|includes?),?)?(?:\s+all(?:\s+of\s+(?:the\s+)?(?:following|these))?(?:\s+the\s+following)?)?\s*$",
    re.I | re.S,
)
INDEFINITE = re.compile(
    r"^\s*(?:(?:is|are|was|were)\s+(?:an?|one|seen|used|included|associated|considered|also|related|involved|found|useful)"
    r"|can|may|could|does|do|will|causes?|increases?|decreases?|produces?|shows?|have|has)\b",
    re.I,
)
DEFINITE = re.compile(
    r"\b(?:most|best|likely|first|primary|main|next|commonest|earliest|greatest|strongest|highest|lowest|choice|only"
    r"|probabl[ey]|gold|responsible|expected|appropriate|diagnosis|surest|this patient|this case)\b",
    re.I,
)
ASKS = re.compile(
    r"\b(?:which|what|who|whom|why|how)\b|^(?:where|is|are|was|were|does|do|did|can|could|should|has|have|will|would|when)\b.*\?",
    re.I | re.S,
)
UNFINISHED = re.compile(
    r"\b(?:is|are|was|were|be|been|by|from|in|with|to|of|for|as|because|at|on|the|an?|than|that|into|include|includes"
    r"|including|through|upto|after|before|between|about|regarding|seen|called|known as|causes?|shows?|exceeds?|has|have"
    r"|indicates?|means?|denotes?|suggests?|produces?|inhibits?|contains?|during|within|via|against|over|under"
    r"|increases?|decreases?|results? in|leads? to|except|expect|likely|represents?|follows?|involves?|requires?)\s*$",
    re.I,
)

MONTHS = r"(?:Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sept?|Oct|Nov|Dec)[a-z]*"
EXAMS = (
    r"(?:AIIMS|AIPGMEE|AIPG|PGMEE|PGMCET|PGI|NEET|DNB|JIPMER|UPSC|COMEDK?|KCET|KAR|FMGE|NBE|MAHE|CMC|AFMC|DPG"
    r"|MCI|TNPG|APPG|WBPG|MHPG|AI|PG|AP|TN|UP|MP|WB|BHU|AMU|MH|MAH|Delhi|Kerala|Bihar|All India|REPEAT|Pattern|Recent)"
)
YEAR = r"(?:(?:19|20)\d\d|['’]?\d\d)"
EXAM_NOISE = [
    re.compile(rf"[\s:]*[\[(]\s*(?:{EXAMS}|{MONTHS}|(?:19|20)\d\d)(?:{EXAMS}|{MONTHS}|{YEAR}|[\s,.;:&/'’-])*[\])][\s:.–-]*$"),
    re.compile(rf"[\s:?(]*\b(?:{EXAMS}\s+)?{MONTHS}[\s,.]*(?:19|20)\d\d(?:{MONTHS}|(?:19|20)\d\d|[\s,.&])*[\s:).]*$"),
    re.compile(rf"\s*:\s*(?:{EXAMS}|Punjab)\s+{YEAR}(?:{EXAMS}|Punjab|{YEAR}|[\s,;&])*$"),
    re.compile(r"\s*\((?:[a-e]\s*,\s*)+[a-h]\)\s*$"),
    re.compile(r"\s*aEUR\S*\s*$"),
]  # fmt: skip
ALTERNATIVE = re.compile(r"^.{3,200}?\(or\)\s*(?=\S.{10})", re.I | re.S)
TRAILING = " \n\t:;,–—_(=-"
MISSING_BLANK = re.compile(r"(?<=[a-z)]{2}[.?])(?=(?:Which|What|All|The|In|A|On|Best|Most)\b)")
WRAPPED = re.compile(r"(?<=[a-z,]) *\n(?=[a-z])")
SENTENCE_END = re.compile(
    r"(?:[.!?][\"”’')\]]*|\|)\s+(?=[\"“‘'|]?\s*[A-Z0-9])|\n+(?=[\"“‘]?[A-Z0-9])"
)


def parse_stem(question: str) -> Stem:
    """The case and the asking sentence of a multiple-choice question, rewritten to stand alone."""
    case, asking = split_case(clean(question))
    question_mark = "?" in asking[-3:]
    asking = asking.rstrip(" ?.:;|\n").rstrip(TRAILING)
    if EXCEPT.search(asking) or re.match(r"all\s+except\s+one\b", asking, re.I):
        return Stem(
            case, _exception(EXCEPT.sub("", asking).rstrip(TRAILING + ".")), "exception", True
        )
    asking = OF_THE_FOLLOWING.sub("", asking)
    asking = AMONG.sub("", asking)
    if match := TRUE_ABOUT.search(asking):
        judged = " ".join(match[1].lower().split())
        return Stem(
            case, f"Which of these is {judged} {match[2].lower()} {match[3]}?", "question", True
        )
    needs_options = bool(NEGATED.search(asking) or TRUE.search(asking))
    if match := WHICH.search(asking):
        after = asking[match.end() :]
        needs_options |= bool(INDEFINITE.match(after) and not DEFINITE.search(asking))
        asking = _rewrite_which(asking, match, "which of these" if needs_options else "what")
        return Stem(case, _sentence(asking) + "?", "question", needs_options)
    asking = STARTS_WITH_FOLLOWING.sub(lambda m: f"Which {singular_phrase(m[1])}", asking)
    asking = ENDS_IN_THE_FOLLOWING.sub(lambda m: f"which {singular_phrase(m[1])}", asking)
    asking = _capitalised(asking.strip())
    asking = THE_FOLLOWING_IS.sub(r"which of these \1", asking, count=1)
    if LEFT_HANGING.search(asking):
        asking = LEFT_HANGING.sub(
            lambda m: "of these" if m[0].lower().startswith("of") else "", asking
        )
        asking, needs_options = asking.strip(), True
    return Stem(case, *_form(_capitalised(asking), question_mark), needs_options)


def clean(question: str) -> str:
    """The question without the marks that exams left in it: years, exam names, alternative wordings."""
    text = question.replace("\xa0", " ").replace("&;", "'").strip().strip('"').strip()
    text, end = text[:-120], text[-120:]  # only the end is searched: vignettes are long
    if "aEUR" in end or any(char.isdigit() or char in ")]" for char in end[-12:]):
        for noise in EXAM_NOISE * 2:
            end = noise.sub("", end)
    text += end
    if "(or)" in text[:220].lower():
        text = ALTERNATIVE.sub("", text)
    return MISSING_BLANK.sub(" ", WRAPPED.sub(" ", text))


def split_case(text: str) -> tuple[str, str]:
    """The vignette, with its trailing blank, and the sentence that asks."""
    starts = [0, *(match.end() for match in SENTENCE_END.finditer(text))]
    ends = [*starts[1:], len(text)]
    asked = len(starts) - 1
    while asked > 0 and not re.search(r"[A-Za-z]{2}", text[starts[asked] : ends[asked]]):
        asked -= 1
    if asked and not ASKS.search(text, starts[asked]):
        which = [i for i in range(asked) if WHICH.search(text, starts[i], ends[i])]
        asked = which[-1] if which else asked
    start, end = starts[asked], ends[asked]
    case, tail = text[:start], text[end:].strip()
    if re.search(r"\w", tail):  # a table that stands after the question belongs to the case
        case = f"{case}{tail} "
    return case, text[start:end].strip().lstrip("| ").rstrip("| ")


def _exception(body: str) -> str:
    """`All of the following are X` → `All of these are X except one`."""
    if match := TRUE_ALL.match(body):
        return f"All of these are true {match[1].lower()} {match[2].rstrip(' ,')} except one"
    body, changed = re.subn(
        rf"\b(?:all|each|any)\s+(?:of\s+)?(?:the\s+)?{FOLLOWING}\b",
        "all of these",
        body,
        count=1,
        flags=re.I,
    )
    if not changed:
        body = re.sub(
            r"\b(?:all|each)\s+(?=are\b|is\b|have\b|has\b|can\b|were\b|may\b)",
            "All of these ",
            body,
            count=1,
            flags=re.I,
        )
        body = re.sub(
            rf"\b(?:all|the\s+{FOLLOWING}|{FOLLOWING})[\s,:;-]*$",
            "all of these",
            body,
            count=1,
            flags=re.I,
        )
        body = re.sub(rf"^(?:the\s+)?{FOLLOWING}\b", "All of these", body, count=1, flags=re.I)
        body = re.sub(rf"\b(?:the\s+)?{FOLLOWING}\b", "these", body, count=1, flags=re.I)
    body = _capitalised(body.strip(" ,;:-–"))
    if re.match(r"all\s+except\s+one\b", body, re.I):
        return re.sub(
            r"^all\s+except\s+one\b(?:\s+of\s+these)?", "All except one of these", body, flags=re.I
        )
    return (
        f"{body} except one"
        if re.search(r"\bthese\b", body, re.I)
        else f"{body} except one of these"
    )


def _rewrite_which(asking: str, match: re.Match, pronoun: str) -> str:
    """`Which of the following is …` → `What is …`; `… which of the following drugs` → `… which drug`."""
    before, after = asking[: match.start()], asking[match.end() :]
    words = after.split()
    first = words[0].lower().strip(",") if words else ""
    second = words[1].lower() if len(words) > 1 else ""
    if not words or stands_for_noun(first, second):
        return WHAT_DESCRIBE.sub(r"\1s", f"{before}{pronoun}{after}")
    return f"{before}which {noun_phrase(after.lstrip())}"


def _form(asking: str, question_mark: bool) -> tuple[str, str]:
    if ASKS.search(asking + ("?" if question_mark else "")):
        return asking + "?", "question"
    if UNFINISHED.search(asking):
        return asking, "statement"
    return asking, "phrase"


def _sentence(text: str) -> str:
    return _capitalised(" ".join(text.split(" ")).strip())


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
