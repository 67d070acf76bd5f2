"""The folder of one run: its layout, and whether it may be started, resumed or is finished.

recipe.yaml               the resolved recipe
inputs.json               what else the numbers depend on: exact models and data, processes
checkpoints/checkpoint-N/
final_model/              adapter or full weights, tokenizer, model card
results/                  run.json, held-out measurements, pictures, report
tensorboard/, wandb/      only of a tracker that `report_to` names
COMPLETE                  written last; without it the run does not count as finished
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from medistill_trl import sealed_json
from medistill_trl.arguments import EVALUATION_KEYS, FREE_ON_RESUME
from medistill_trl.errors import UserError
from medistill_trl.files import write_text
from medistill_trl.locks import try_lock
from medistill_trl.recipe import Recipe, read_saved
from medistill_trl.recipe_reading import parse_value

# In results/.
RECORD = "run.json"
EVALUATION = "comprehensive_evaluation.json"
HELDOUT = "heldout"  # among the items: those of training
REMEDY = "put a copy of the file back, or make the run anew"
HEADER = "# The resolved recipe of this run; running it again reproduces the run.\n"


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def inputs(self) -> Path:
        return self.path / "inputs.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final_model(self) -> Path:
        return self.path / "final_model"

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def evaluation(self) -> Path:
        return self.results / EVALUATION

    @property
    def complete(self) -> Path:
        return self.path / "COMPLETE"

    @property
    def is_complete(self) -> bool:
        return self.complete.is_file()

    def check(self, recipe: Recipe) -> None:
        """Refuse what would overwrite, mix or over-train a run. Writes nothing.

        Raises:
            UserError: the run is finished; it exists and --resume was not given; --resume was given
                and there is nothing to continue, or the recipe is not the one it was started with.
        """
        resume = recipe.values["resume"]
        if self.is_complete:
            raise UserError(
                f"{self.path}: this run is complete and is not trained further; choose another --run_name "
                "or --output_dir, or remove the folder"
            )
        if not resume and self.recipe.exists():
            raise UserError(
                f"{self.path}: an unfinished run is here; continue it with --resume, choose another "
                "--run_name or --output_dir, or remove the folder"
            )
        if resume and not self.recipe.exists():
            raise UserError(
                f"{self.path}: nothing to resume, there is no run here; drop --resume to start one"
            )
        if resume:
            self._check_same_recipe(recipe)

    def _check_same_recipe(self, recipe: Recipe) -> None:
        saved = read_saved(self.recipe)
        now = parse_value(recipe.to_yaml())
        ignored = dict.fromkeys((*FREE_ON_RESUME, *EVALUATION_KEYS))
        self._refuse_changes("the recipe differs", saved | ignored, now | ignored)

    def _refuse_changes(self, what: str, saved: dict, now: dict) -> None:
        changed = [
            f"  {key}: {saved.get(key)!r} when started, {now.get(key)!r} now"
            for key in sorted({*saved, *now})
            if saved.get(key) != now.get(key)
        ]
        if changed:
            raise UserError(
                f"{self.path}: --resume continues the same run, but {what}:\n"
                + "\n".join(changed)
                + f"\nResume with {self.recipe} on the same inputs, or start a new run under another "
                "--run_name."
            )

    def check_same_inputs(self, inputs: dict) -> None:
        """Refuse to resume on other models, data or processes than the run was started with."""
        saved = self.read_inputs()
        self._refuse_changes("its inputs differ", saved, inputs)

    def start(self, recipe: Recipe, inputs: dict) -> None:
        """Make the folders and save what the run is."""
        for folder in (self.checkpoints, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        sealed_json.write_record(self.inputs, inputs)
        write_text(self.recipe, HEADER + recipe.to_yaml())

    def lock(self) -> IO:
        """Keep every other launch out of the folder, which is made; the kernel lets go when the process ends.

        Raises:
            UserError: another launch is at work here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / ".lock").open("w")
        if not try_lock(lock):
            raise UserError(
                f"{self.path}: another process is at work on this run; wait for it, or choose another --run_name"
            )
        return lock

    def mark_complete(self) -> None:
        write_text(self.complete, "training, final model and results are all written\n")

    def write_result(self, name: str, content: dict) -> None:
        sealed_json.write_record(self.results / name, content)

    def items(self, part: str) -> Path:
        """A record for each item of a part of the evaluation, or of the held-out check; for paired tests."""
        return self.results / "items" / f"{part}.jsonl"

    def write_items(self, part: str, rows: list[dict]) -> str:
        """Write the file `items` names; its digest belongs into the result, under `items` and the part's name."""
        return sealed_json.write_items(self.items(part), rows)

    def read_inputs(self) -> dict:
        return sealed_json.read_record(self.inputs, f"{REMEDY} ({self.path})")

    def write(self, name: str, content: dict) -> None:
        """A file that belongs to the run, not to its results."""
        write_text(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def read_result(self, name: str) -> dict:
        """A result in results/.

        Raises:
            UserError: it is not as it was written.
        """
        return sealed_json.read_record(self.results / name, self._remedy(name))

    def digests(self) -> dict[str, str | None]:
        """Which results these are: the sha256 of each file, None of one that is not there.

        A page that shows what was made of results tells by them whether they are still the same.
        """
        found = {}
        for name in (RECORD, EVALUATION):
            path = self.results / name
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        return found

    def read_items(self, part: str) -> list[dict]:
        """What `write_items` wrote; none if the file is not there.

        Raises:
            UserError: it is not what was written with the result.
        """
        path, result = self.items(part), RECORD if part == HELDOUT else EVALUATION
        if not path.is_file():
            return []
        known = (
            self.read_result(result).get("items", {}) if (self.results / result).is_file() else {}
        )
        return sealed_json.read_items(path, known.get(part), self._remedy(result))

    def _remedy(self, name: str) -> str:
        if name == EVALUATION:
            return f"evaluate again: python -m eval.run {self.path}"
        return f"{REMEDY} ({self.path})"
