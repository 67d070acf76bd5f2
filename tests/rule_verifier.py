"""A verifier that goes by rules, and findings for it to judge."""

from eval.verifier import Verdict

KNEE, HIP = "The knee shows swelling.", "The hip lacks redness."


class Rules:
    """A premise entails a claim all of whose parts, joined by `and`, stand in it word for word."""

    source = fingerprint = "rules"

    def judge(self, pairs):
        return [
            self._verdict(premise.lower(), claim.lower().rstrip(".")) for premise, claim in pairs
        ]

    def _verdict(self, premise, claim):
        entailed = all(part in premise for part in claim.split(" and "))
        contradicted = claim.replace("shows", "lacks") in premise and not entailed
        return Verdict(float(entailed), float(contradicted))
