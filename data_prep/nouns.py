"""The noun behind "which of the following": where it ends, and its singular."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


AUXILIARIES = _words(
    "is are was were has have had does do did would will could can may might should must shall"
)
PLURAL_VERBS = _words("are do have were")
ADVERBS = _words(
    "accurately also best commonly correctly directly first least likely more most mostly not "
    "often only primarily typically usually"
)
PREPOSITIONS = _words(
    "about after associated at by concerning describing during for from if in of on regarding "
    "seen that to under used when who with"
)
VERBS = _words(
    "accounts acts belongs cause causes characterises characterizes confirms constitutes contains "
    "contributes correlates decreases describe describes develops differentiate differentiates "
    "distinguishes explain explains help helps include includes increases indicates inhibit "
    "inhibits lacks make makes match matches mediates occurs passes predicts prevents produce "
    "produces provides reduces regarding regulates remains represent represents requires show "
    "shows stimulates suggests supports transmit transmits"
)
IRREGULAR = {
    "bacteria": "bacterium", "criteria": "criterion", "phenomena": "phenomenon", "diagnoses": "diagnosis",
    "hypotheses": "hypothesis", "fungi": "fungus", "nuclei": "nucleus", "indices": "index",
    "metastases": "metastasis", "vertebrae": "vertebra", "viruses": "virus", "sinuses": "sinus",
    "bacilli": "bacillus", "biases": "bias", "analyses": "analysis", "prognoses": "prognosis",
    "foramina": "foramen", "bronchi": "bronchus", "loci": "locus", "stimuli": "stimulus",
}  # fmt: skip
UNCHANGED = {
    "series",
    "species",
    "diabetes",
    "herpes",
    "pancreas",
    "biceps",
    "triceps",
    "rabies",
    "yes",
}


def stands_for_noun(first: str, second: str) -> bool:
    """Whether "which of the following" has no noun of its own: its next words, lower-case, are a verb."""
    is_verb = first in VERBS and second not in AUXILIARIES and second not in ADVERBS
    return is_verb or first in AUXILIARIES or first in ADVERBS or first in PREPOSITIONS


def noun_phrase(after: str) -> str:
    """The words after "which of the following", their head noun made singular unless its verb is plural."""
    words = after.split(" ")
    head = 0
    while head + 1 < len(words) and head < 6 and not _stops(words[head + 1]):
        if words[head].endswith((",", "?", ":", ".")):
            break
        head += 1
    if head == 6 and len(words) > 7:  # no verb in sight: only the first plural can be meant
        head = next((i for i in range(6) if _singular(words[i]) != words[i]), 0)
    if not _plural_verb(words[head + 1 :]):
        words[head] = _singular(words[head])
    return " ".join(words)


def _stops(word: str) -> bool:
    word = word.lower().strip(",?")
    return word in AUXILIARIES or word in ADVERBS or word in PREPOSITIONS or word in VERBS


def _plural_verb(words: list[str]) -> bool:
    """Whether the first verb among `words` is one that only a plural noun takes."""
    for i, word in enumerate(words[:12]):
        word = word.lower().strip(",?")
        if word in AUXILIARIES:
            return word in PLURAL_VERBS
        if word in ADVERBS:
            following = words[i + 1].lower() if i + 1 < len(words) else ""
            if following in ADVERBS or following in AUXILIARIES:
                continue
            return not following.endswith(("s", "ed", "ly"))
        if word in VERBS:
            return not word.endswith("s")
    return False


def singular_phrase(phrase: str) -> str:
    """The phrase with its last word made singular; a blank behind it is kept."""
    words = phrase.split()
    if words:
        words[-1] = _singular(words[-1])
    return " ".join(words) + (" " if phrase.endswith(" ") else "")


def _singular(word: str) -> str:
    bare = word.rstrip("?,.:")
    tail, low = word[len(bare) :], bare.lower()
    if low in IRREGULAR:
        return IRREGULAR[low] + tail
    if (
        len(low) < 4
        or low in UNCHANGED
        or not low.endswith("s")
        or low.endswith(("ss", "us", "is"))
    ):
        return word
    if low.endswith("ies"):
        return bare[:-3] + "y" + tail
    if low.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return bare[:-2] + tail
    return bare[:-1] + tail
