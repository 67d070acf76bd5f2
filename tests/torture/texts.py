"""Damaged texts: recipes, flags, studies, rows of every kind of data file, stored completions."""

import json
import random
import shutil
import sqlite3
import tempfile
from functools import cache
from pathlib import Path

import yaml
from conftest import ROOT, make_model
from tiny_setting import make_form
from tiny_subjects import tiny_pair
from torture.mutate import ODD_VALUES, damage_bytes, damage_value

from data_prep import records
from data_prep.inputs import find
from data_prep.reading import read_rows
from eval import faithfulness, fidelity, perplexity
from eval.item_store import ItemStore
from eval.options import Options
from eval.questions import load_benchmarks
from medistill_trl import data, methods, pipeline, recipe
from medistill_trl.completion_store import CompletionStore
from medistill_trl.models import set_generation
from medistill_trl.recipe_reading import parse_value
from medistill_trl.run_directory import RunDirectory
from medistill_trl.study import definition, grid
from medistill_trl.teacher import Sampling, Teacher

SAMPLE = ROOT / "data_prep/sample"
OVERLAYS = sorted((ROOT / "recipes/overlays").glob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
STUDIES = sorted((ROOT / "recipes/studies").glob("*.yaml"))


def _damaged_yaml(path: Path, draw: random.Random) -> bytes:
    """Half of them stay YAML, with other content."""
    text = path.read_bytes()
    if draw.random() < 0.5:
        return damage_bytes(text, draw)
    value = damage_value(parse_value(text.decode()), draw)
    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False).encode(
        "utf-8", "surrogatepass"
    )


# --- recipes and studies


def _load_recipe(words: list[str]) -> None:
    checked = recipe.load(words)
    assert yaml.safe_load(checked.to_yaml()) is not None
    directory = RunDirectory(checked.output_dir)
    directory.check(checked)
    pipeline.build_arguments(checked, methods.load(checked.values["method"]), directory, True)


def recipe_file(draw: random.Random, folder: Path):
    path = folder / "mine.yaml"
    path.write_bytes(_damaged_yaml(draw.choice(RECIPES), draw))
    return lambda: _load_recipe([str(path)])


def overlay(draw: random.Random, folder: Path):
    path = folder / "overlay.yaml"
    path.write_bytes(_damaged_yaml(draw.choice(OVERLAYS), draw))
    return lambda: _load_recipe([str(draw.choice(RECIPES)), str(path)])


def flags(draw: random.Random, folder: Path):
    known = parse_value(draw.choice(RECIPES).read_text())
    given = damage_value({key: known[key] for key in draw.sample(sorted(known), 3)}, draw)
    words = [str(draw.choice(RECIPES))]
    for key, value in given.items():
        words += [
            f"--{key}",
            *([str(v) for v in value] if isinstance(value, list) else [str(value)]),
        ]
    return lambda: _load_recipe(words)


def study(draw: random.Random, folder: Path):
    path = folder / "study.yaml"
    path.write_bytes(_damaged_yaml(draw.choice(STUDIES), draw))

    def start():
        grid.expand(definition.read(str(path), [], []), folder / "written")

    return start


# --- rows


def _damaged_rows(path: Path, draw: random.Random, keep: int = 6) -> bytes:
    lines = path.read_bytes().splitlines(keepends=True)[:keep]
    number = draw.randrange(len(lines))
    if draw.random() < 0.4:
        lines[number] = damage_bytes(lines[number], draw)
    else:
        value = damage_value(json.loads(lines[number]), draw)
        lines[number] = (json.dumps(value, default=str) + "\n").encode("utf-8", "surrogatepass")
    return b"".join(lines)


def prompts(draw: random.Random, folder: Path):
    path = folder / "train.jsonl"
    path.write_bytes(_damaged_rows(SAMPLE / "processed/train.jsonl", draw))
    return lambda: data.read_prompts(str(path), draw.choice(("fail", "skip")))


def _data_folder(draw: random.Random, folder: Path, name: str) -> Path:
    """A data build in which one file is damaged."""
    root = folder / "data"
    for path in SAMPLE.rglob("*.jsonl"):
        place = root / path.relative_to(SAMPLE)
        if "raw" not in place.parts:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))
    (root / name).write_bytes(_damaged_rows(SAMPLE / name, draw))
    return root


@cache
def _pair():
    return tiny_pair()


def _options(**changes) -> Options:
    return Options(limit=6, answer_tokens=4, batch_size=4, option_shuffles=0, **changes)


def benchmark(draw: random.Random, folder: Path):
    name = draw.choice(("medqa", "medmcqa", "pubmedqa", "pubhealth", "pubhealth_2class"))
    place = draw.choice((f"benchmarks/{name}.jsonl", f"benchmarks/few_shot/{name}.jsonl"))
    root = _data_folder(draw, folder, place)
    options = Options(limit=6, few_shot=2, option_shuffles=1, benchmarks=[name])
    return lambda: load_benchmarks(root, options)


def corpus(draw: random.Random, folder: Path):
    """What perplexity, fidelity and faithfulness read, up to the tiny models' answers."""
    place, part = draw.choice(
        (
            ("medppl_10k.jsonl", perplexity),
            ("fidelitybench_med.jsonl", faithfulness),
            ("processed/test.jsonl", fidelity),
        )
    )
    root = _data_folder(draw, folder, place)
    store = ItemStore(folder / "written")
    return lambda: part.evaluate(_pair(), root, _options(), store)


def raw_rows(draw: random.Random, folder: Path):
    """A release's file, row by row, as the data build reads and checks it."""
    name = draw.choice(("medqa", "medmcqa", "pubmedqa", "pubhealth"))
    copy = folder / name
    shutil.copytree(SAMPLE / "raw" / name, copy)
    path = draw.choice(sorted(path for path in copy.iterdir() if path.suffix == ".jsonl"))
    path.write_bytes(_damaged_rows(path, draw))
    if draw.random() < 0.3:
        path = path.rename(path.with_suffix(".json"))

    def start():
        found = find(name, folder)
        facts = found.source.survey(found.folder, found.files)
        for file in found.files:
            for row in read_rows(file.path):
                records._row(found.source, {"split": file.split, **row}, facts)

    return start


# --- stored completions


@cache
def _teacher() -> Teacher:
    form = make_form()
    model = make_model(len(form.tokenizer), layers=1)
    set_generation(model.eval(), form.tokenizer)
    return Teacher(model, form.tokenizer, form, "t")


def _draw_from(path: Path) -> None:
    CompletionStore(path).draw(_teacher(), ["Why rest?", "Why walk?"], Sampling(4))


@cache
def _whole_store() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        _draw_from(Path(folder) / "whole.sqlite")
        return (Path(folder) / "whole.sqlite").read_bytes()


def completions(draw: random.Random, folder: Path):
    path = folder / "written/completions.sqlite"  # a store may be written to
    path.parent.mkdir()
    whole = _whole_store()
    if draw.random() < 0.5:
        path.write_bytes(damage_bytes(whole, draw))
        return lambda: _draw_from(path)
    path.write_bytes(whole)
    column = draw.choice(("text", "token_ids", "finished", "end_id", "key", "sampling"))
    odd = draw.choice((*ODD_VALUES, "[", "[1", '["a"]', "[-1]", "[1e9]", "{}", "[99999999]", -5))
    if not isinstance(odd, str | int | float | bytes | None):
        odd = json.dumps(odd, default=str)
    with sqlite3.connect(path) as database:
        try:
            database.execute(f"UPDATE completions SET {column} = ? WHERE rowid = 1", (odd,))
        except (sqlite3.Error, OverflowError, UnicodeError):
            database.execute("DROP TABLE completions")
    return lambda: _draw_from(path)


TARGETS = (
    ("recipe", recipe_file, 20),
    ("overlay", overlay, 10),
    ("flags", flags, 10),
    ("study", study, 8),
    ("prompts", prompts, 12),
    ("benchmark", benchmark, 8),
    ("corpus", corpus, 8),
    ("raw_rows", raw_rows, 12),
    ("completions", completions, 6),
)
