"""Questions about a picture that the record does not hold; a table in the text is fine."""

import re

PICTURES = (
    r"(?:images?|pictures?|figures?|photos?|photographs?|photomicrographs?|pictographs?|exhibit|illustrations?"
    r"|diagrams?|graphs?|micrographs?|karyogram|radiographs?|scatter ?plots?|curves?)"
)
# Looked for first, in lower case: most questions have none of them.
WORDS = (
    *("shown", "image", "picture", "figure", "photo", "exhibit", "illustrat", "diagram", "graph"),
    *("scatter", "arrow", "marked", "label", "curve", "fig.", "marker", "karyogram", "displayed"),
    *("depicted", "the letter"),
)
# "Laboratory results are shown below:" and then the table: nothing is missing.
TABLE = re.compile(
    r"\b(?:shown|show|given|listed)(?:\s+(?:here|below|in the (?:following )?table(?: below)?))?\s*[.:]?\s*[|\n][\s|]*"
    r"(?!Wh|Of\b|In\b|An?\b|The\b|This\b)(?=[A-Z])"
)
PICTURE = re.compile(
    r"\bshown\s*(?:[.)?]|$|,\s*(?:what|which|you)\b)|\b(?:is|are|as)\s+shown\s+(?:below|above|here)\b(?!\s*:)"
    r"|\bshown\s+(?:below|above|here)\s*[.?)]"
    r"|\b(?:shown|seen|displayed|depicted|demonstrated|provided|given|presented|illustrated|marked|labell?ed)\s+"
    rf"(?:\w+\s+)?(?:in|by|on|as|with)\s+(?:the\s+|this\s+|an?\s+)?(?:\w+\s+)?(?:{PICTURES}|below|arrows?)\b(?!\s+studies)"
    rf"|\b(?:see|refer to|(?:findings|as) in)\s+(?:the\s+)?(?:\w+\s+)?{PICTURES}\b"
    r"|\b(?:[Ff]igures?|[Ii]mages?|[Ff]ig\.?|[Pp]hoto|[Pp]icture|[Ee]xhibit|[Gg]raph|[Mm]arker)\s+\(?[A-E1-9]\b"
    rf"|\b(?:this|above|given|following|attached|below|accompanying|the)\s+(?:image|picture|photo|photograph|figure|illustration)s?\b(?!\s+of)"
    rf"|\b(?:this|above|given|following|attached|below|accompanying)\s+{PICTURES}\b"
    r"|\bdiagram illustrates\b|\bthe letter ['‘\"“]?[a-zA-Z]['’\"”]? represent"
    rf"|\b{PICTURES}\b(?:\s+[^\s.]+){{0,8}}\s+(?:(?:is|are|was)\s+(?:as\s+)?(?:given(?=\W*$|\.)|shown|provided|attached|below|depicted|displayed)\b"
    r"|(?:given|shown|attached|depicted)\s+(?:below|above|here))"
    r"|\barrow(?:s|ed|head)?\b|\b(?:structure|area|part|point|site|region)s?\s+(?:marked|labell?ed)\b"
    r"|\b[Ff]igure\s+(?:depicts|shows)\b|\bthe\s+exhibit\b|\btaken\s+as\s+shown\b",
)  # fmt: skip
BY_EXPLANATION = re.compile(
    rf"\b(?:the|given|above|this)\s+(?:given\s+|above\s+)?{PICTURES}\s+(?:in the question|shows?|depicts?|given|represents?)\b"
    r"|\bMarker \(|\A\W*Figure shows",
    re.I,
)


def needs_picture(question: str, explanation: str = "") -> bool:
    """Whether the question, by its own words or its explanation's, is about a picture.

    Args:
        question: The stem.
        explanation: The dataset's explanation; may be empty.
    """
    lowered = question.lower()
    if any(word in lowered for word in WORDS) and PICTURE.search(TABLE.sub(" ", question)):
        return True
    return bool(explanation and BY_EXPLANATION.search(explanation))
