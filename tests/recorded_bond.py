"""`recipes/run.py` with a record of what each process of a BOND run draws and trains on.

    RECORD=folder accelerate launch tests/recorded_bond.py recipes/bond.yaml ...

writes `<rank>.json`: for each step what was written, its rewards, its log-ratios to the anchor, and the
trained completions with their weights; and the anchor's sum after each step.
"""

import json
import os
import runpy
from pathlib import Path

from medistill_trl.methods.bond.anchor import Anchor
from medistill_trl.methods.bond.trainer import BondTrainer

RECORD = {"written": [], "scores": [], "ratios": [], "trained": [], "anchor": []}


def record(cls, name, keep):
    """Let a method note what it was given and what it returned."""
    method = getattr(cls, name)

    def recorded(self, *args):
        result = method(self, *args)
        keep(self, args, result)
        return result

    setattr(cls, name, recorded)


def ratios(self, args, result):
    if args[1] == "train":
        RECORD["ratios"].append([r.sum().item() for r in result[2]["kl_to_anchor"]])


def trained(self, args, result):
    completions = [[token for token in one["labels"] if token >= 0] for one in args[0]]
    weights = [values[0].item() for values in args[1]]
    RECORD["trained"].append(list(zip(completions, weights, strict=True)))


def anchor_sum(self, args, result):
    RECORD["anchor"].append(sum(anchor.double().sum().item() for _, anchor in self._pairs))


record(
    BondTrainer,
    "_write",
    lambda self, args, result: RECORD["written"].append([one.token_ids for one in result]),
)
record(
    BondTrainer,
    "_comparable",
    lambda self, args, result: RECORD["scores"].append(result.tolist()),
)
record(BondTrainer, "_score", ratios)
record(BondTrainer, "_micro_batches", trained)
record(Anchor, "follow", anchor_sum)
try:
    runpy.run_path("recipes/run.py", run_name="__main__")
finally:
    path = Path(os.environ["RECORD"]) / f"{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps(RECORD))
