"""eval/plots: what is drawn, in which colours, and that colour-blind readers tell them apart."""

import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from run_folders import edit, write_run

from eval.comparison.result import build
from eval.comparison.runs import find
from eval.plots import PICTURES, draw
from eval.plots.ablation import ablation_plot
from eval.plots.dots import benchmark_comparison, fidelity_metrics
from eval.plots.pareto import pareto
from eval.plots.radar import fidelitybench_radar
from eval.plots.style import COLOURS, MARKS, OTHER_COLOUR, TEACHER, looks
from eval.plots.training import compared_curves
from medistill_trl.recipe import methods

SKILLS = {"sft": 0.4, "logit_kd": 0.8, "ppo": 0.3}
# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(
            folder / f"{method}-{seed}", method, seed, skill + seed / 100, seconds=100 + 50 * n
        )
        for n, (method, skill) in enumerate(SKILLS.items())
        for seed in (1, 2)
    ]
    return build(find(runs), resamples=99)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    runs = [
        write_run(
            folder / f"{method}-{rank}-{seed}",
            method,
            seed,
            0.1 * rank**0.5 + seed / 50,
            lora_r=rank,
            evaluated=False,
        )
        for method in ("sft", "logit_kd")
        for rank in (2, 8, 32)
        for seed in (1, 2)
    ]
    return build(find(runs), resamples=99)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def lab(colour: str, vision) -> np.ndarray:
    """CIE Lab of a colour as seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(vision) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = (np.array(to_xyz) @ seen) / [0.9505, 1, 1.089]
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("name", VISIONS)
def test_every_two_methods_are_told_apart_by_every_reader(name):
    for one, other in itertools.combinations([*COLOURS.values(), TEACHER, "#FFFFFF"], 2):
        distance = np.linalg.norm(lab(one, VISIONS[name]) - lab(other, VISIONS[name]))
        assert distance > 15, (one, other)  # about 2 is just noticeable


def test_every_method_has_a_colour_and_a_mark_of_its_own():
    assert set(methods()) == set(COLOURS) == set(MARKS)
    assert len(set(COLOURS.values())) == len(set(MARKS.values())) == 10
    own = looks([{"name": "a", "method": "mine"}, {"name": "b", "method": "mine"}])
    assert own["a"].colour == own["b"].colour == OTHER_COLOUR
    assert own["a"].strength != own["b"].strength


def test_every_configuration_of_a_method_has_a_look_of_its_own():
    five = looks([{"name": str(rank), "method": "sft"} for rank in (2, 4, 8, 16, 32)])
    strengths = [look.strength for look in five.values()]
    assert strengths == sorted(set(strengths), reverse=True)
    assert strengths[0] == 1.0
    assert strengths[-1] >= 0.3
    neighbours = zip(list(five.values())[:-1], list(five.values())[1:], strict=True)
    assert all(one.line != other.line for one, other in neighbours)


def colours(figure) -> set[str]:
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return {to_hex(line.get_color()).upper() for line in lines}


@pytest.mark.parametrize("name", sorted(set(PICTURES) - {"ablation_plot"}))
def test_a_method_has_its_colour_in_every_picture(content, name):
    found = colours(PICTURES[name](content))
    assert {COLOURS[method].upper() for method in SKILLS} <= found
    assert not {COLOURS[method].upper() for method in set(COLOURS) - set(SKILLS)} & found


def test_all_are_drawn_as_files(content, tmp_path):
    paths = draw(content, tmp_path / "out")
    assert {path.stem for path in paths} == set(PICTURES) - {"ablation_plot"}
    for path in paths:
        height, width, _ = plt.imread(path).shape
        assert width > 600
        assert height > 250
    first = paths[0].read_bytes()
    assert draw(json.loads(json.dumps(content)), tmp_path / "again")[0].read_bytes() == first


def test_benchmarks_beside_teacher_and_floor(content):
    panels = {axes.get_title(): axes for axes in benchmark_comparison(content).axes}
    assert list(panels) == ["MedQA", "PubMedQA", "Retention: right where the teacher is"]
    axes = panels["MedQA"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SKILLS)
    measure = content["measures"]["benchmarks.medqa.accuracy"]
    shown = [line.get_xdata()[0] for line in axes.get_lines()]
    expected = [measure["values"][name]["value"] for name in SKILLS]
    assert shown == [*expected, measure["teacher"]["value"], 0.3]
    ends = [segment[:, 0].tolist() for part in axes.collections for segment in part.get_segments()]
    assert ends == [measure["values"][name]["interval_95"] for name in SKILLS]


def test_fidelity_on_three_sets_of_answers(content):
    panels = {axes.get_title(): axes for axes in fidelity_metrics(content).axes}
    kl = panels["KL(T‖S), nats (← better)"]
    assert len(kl.get_lines()) == 3 * len(SKILLS)
    assert "greedy answers: ROUGE-L (→ better)" in panels


def test_radar_leaves_a_gap_where_nothing_is_defined(content):
    figure = fidelitybench_radar(content)
    assert [axes.get_title() for axes in figure.axes] == list(SKILLS)
    teacher, own = figure.axes[0].get_lines()
    values = content["measures"]["faithfulness.hallucination"]
    assert own.get_ydata()[0] == 1 - values["values"]["sft"]["value"]
    assert teacher.get_ydata()[0] == 1 - values["teacher"]["value"]
    without = {k: v for k, v in content["measures"].items() if k != "faithfulness.citation_recall"}
    figure = fidelitybench_radar(content | {"measures": without})
    assert np.isnan(figure.axes[0].get_lines()[1].get_ydata()).sum() == 1


def test_the_front_goes_through_what_none_beats(content):
    axes = pareto(content).axes[0]
    assert content["pareto"]["front"] == ["sft", "logit_kd"]
    assert axes.get_lines()[-1].get_xdata() == pytest.approx([100, 150])
    assert pareto(content | {"pareto": {"front": None, "note": "other devices"}}) is None


def test_an_ablation_has_a_line_a_method_and_a_band_over_seeds(ablation, content):
    axes = ablation_plot(ablation).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "8", "32"]
    assert axes.get_xscale() == "log"
    measure = ablation["measures"]["heldout.kl_nats"]["values"]
    assert [line.get_label() for line in axes.get_lines()] == ["sft", "logit_kd"]
    line = axes.get_lines()[0]
    assert line.get_ydata().tolist() == [measure[f"sft (lora_r {r})"]["value"] for r in (2, 8, 32)]
    low, high = axes.collections[0].get_paths()[0].get_extents().intervaly
    first, last = measure["sft (lora_r 2)"], measure["sft (lora_r 32)"]
    assert high == pytest.approx(first["value"] + first["sd_over_seeds"])
    assert low == pytest.approx(last["value"] - last["sd_over_seeds"])
    assert ablation_plot(content) is None


def test_curves_are_means_over_seeds_within_a_band(content):
    panels = compared_curves(content).axes
    assert len(panels) == 3
    line = panels[0].get_lines()[0]
    curves = [curve["kl_nats"] for curve in content["curves"]["sft"]]
    assert line.get_xdata().tolist() == [0, 24, 48]
    assert line.get_ydata() == pytest.approx(np.mean(curves, axis=0))
    # Seeds that ended at different steps have a line each.
    other = content["curves"] | {
        "sft": [content["curves"]["sft"][0], {"seed": 2, "steps": [0, 9], "kl_nats": [4, 3]}]
    }
    panels = compared_curves(content | {"curves": other}).axes
    assert [len(line.get_xdata()) for line in panels[0].get_lines()[:2]] == [3, 2]


def test_without_an_evaluation_there_is_nothing_of_it(tmp_path):
    run = write_run(tmp_path / "run", evaluated=False)
    edit(run, "run.json", heldout__after__kl_nats=None, heldout__after__top1=None)
    assert draw(build(find([run])), tmp_path / "out") == []
