"""The folder of one run: its layout, and whether it may be started, resumed or is finished.

recipe.yaml               the resolved recipe
inputs.json               what else the numbers depend on: exact models and data, processes
checkpoints/checkpoint-N/
final_model/              adapter or full weights, tokenizer, model card
results/                  run.json, held-out measurements, pictures, report
tensorboard/, wandb/      only of a tracker that `report_to` names
COMPLETE                  written last; without it the run does not count as finished
"""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from medistill_trl.errors import UserError
from medistill_trl.files import write_text
from medistill_trl.recipe import Recipe

# In results/.
RECORD = "run.json"
EVALUATION = "comprehensive_evaluation.json"
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
        saved = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        now = yaml.safe_load(recipe.to_yaml())
        ignored = {"output_dir": None}
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
        saved = json.loads(self.inputs.read_text(encoding="utf-8"))
        self._refuse_changes("its inputs differ", saved, inputs)

    def start(self, recipe: Recipe, inputs: dict) -> None:
        """Make the folders and save what the run is."""
        for folder in (self.checkpoints, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(self.inputs, json.dumps(inputs, indent=2, ensure_ascii=False) + "\n")
        write_text(self.recipe, HEADER + recipe.to_yaml())

    def checkpoint_to_resume(self) -> tuple[Path | None, list[str]]:
        # Imported here: it loads torch, and looking at a run does not need it.
        from medistill_trl.checkpoints import newest_valid

        return newest_valid(self.checkpoints)

    def mark_complete(self) -> None:
        write_text(self.complete, "training, final model and results are all written\n")

    def write_result(self, name: str, content: dict) -> None:
        write_text(self.results / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_items(self, part: str, rows: list[dict]) -> None:
        """results/items/<part>.jsonl: a record for each item, for paired tests."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(self.results / "items" / f"{part}.jsonl", "".join(lines))

    def read_result(self, name: str) -> dict:
        return json.loads((self.results / name).read_text(encoding="utf-8"))
