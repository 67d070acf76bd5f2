"""What an earlier command left where results go: kept beside the new results, or moved aside, never lost.

A part that is not measured again is kept if it would come out the same: the same models, prompt format, recipe, data
and options that bear on it. Anything else is copied into results/earlier-1, -2, … as a whole.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.options import options_of
from medistill_trl.run_directory import EVALUATION, RunDirectory
from medistill_trl.sealed_json import read_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What stays of an earlier result.

    Args:
        content: The earlier file; None without one.
        parts: Those of its parts that stay.
    """

    content: dict | None
    parts: tuple[str, ...]

    def beside(self, now: dict, measured: Sequence[str]) -> dict:
        """The new result before anything is measured, with the parts that stay.

        Args:
            now: The new result's description.
            measured: Parts that will be measured.
        """
        if not self.parts:
            return {**now, "results": {}, "items": {}, "cost": {}}
        decisive = set().union(*map(options_of, measured))
        inherited = {
            name: self.content["options"][name]
            for part in self.parts
            for name in (options_of(part) - decisive) & self.content["options"].keys()
        }
        digests = {**self.content["data"]["sha256"], **now["data"]["sha256"]}
        return {
            **now,
            "options": {**now["options"], **inherited},
            "data": {**now["data"], "sha256": digests},
            **{
                key: {part: self.content[key][part] for part in self.parts}
                for key in ("results", "items", "cost")
            },
        }


def keep(out: Path, now: dict, measured: Sequence[str]) -> Kept:
    """Make room for a new result: decide what stays of an earlier one, and copy aside what does not.

    Args:
        out: Where the results go.
        now: Description of the new result: `schema_version`, `subjects`, `recipe`, `options`, `data`.
        measured: Parts that will be measured.

    Raises:
        UserError: the earlier result cannot be read.
    """
    path = RunDirectory(out).evaluation
    if not path.is_file():
        return Kept(None, ())
    earlier = read_record(path, "move it away, or give another --out")
    now = json.loads(json.dumps(now))  # as it is read back
    found = [name for name, part in earlier["results"].items() if part.keys() != {"skipped"}]
    others = [name for name in found if name not in measured]
    changed = changes(earlier, now)
    decisive = set().union(*map(options_of, measured))
    differing = {
        name for name, value in now["options"].items() if earlier["options"].get(name) != value
    }
    # An option that bears on no part of this command says nothing about the parts of the earlier one.
    bearing = {part: differing & decisive & options_of(part) for part in found}
    kept = () if changed else tuple(part for part in others if not bearing[part])
    flags = sorted(set().union(*bearing.values()))
    changed += [f"--{name}" for name in flags]
    if changed and found:
        folder = _copy_aside(path.parent, found)
        logger.warning(
            "an earlier result here differs in %s; it was moved to %s", ", ".join(changed), folder
        )
        _remove(path.parent, [part for part in found if part not in kept])
    if kept:
        logger.info("kept from an earlier command: %s", ", ".join(kept))
    return Kept(earlier, kept)


def changes(earlier: dict, now: dict) -> list[str]:
    """What no part of the earlier result can be kept for, in words."""
    same = {
        "its schema": lambda content: content["schema_version"],
        "the models": lambda content: [
            {key: value for key, value in subject.items() if key != "source"}  # of any name
            for subject in content["subjects"].values()
        ],
        "the recipe": lambda content: content["recipe"],
    }
    changed = [word for word, fact in same.items() if fact(earlier) != fact(now)]
    known = earlier["data"]["sha256"]
    return changed + [
        name for name, digest in now["data"]["sha256"].items() if known.get(name, digest) != digest
    ]


def _items(results: Path, parts: Sequence[str]) -> list[Path]:
    files = [results / "items" / f"{part}.jsonl" for part in parts]
    return [path for path in files if path.is_file()]


def _copy_aside(results: Path, parts: Sequence[str]) -> Path:
    number = 1
    while (results / f"earlier-{number}").exists():
        number += 1
    folder = results / f"earlier-{number}"
    (folder / "items").mkdir(parents=True)
    shutil.copy2(results / EVALUATION, folder)
    for path in _items(results, parts):
        shutil.copy2(path, folder / "items")
    return folder


def _remove(results: Path, parts: Sequence[str]) -> None:
    (results / EVALUATION).unlink()
    for path in _items(results, parts):
        path.unlink()
