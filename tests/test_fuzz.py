"""A small part of `make torture`: damaged inputs end with a message, never with a traceback or a hang."""

import time

import pytest
from torture import fuzz
from torture.targets import TARGETS

from medistill_trl.errors import UserError

COUNT = 110  # shared out as in the whole; takes about 15 s


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_inputs_are_refused_or_work(target, tmp_path):
    total = sum(each.share for each in TARGETS)
    for seed in range(max(2, round(COUNT * target.share / total))):
        (tmp_path / str(seed)).mkdir()
        outcome = fuzz.attempt(target, seed, tmp_path / str(seed))
        assert outcome.kind != "failed", f"seed {seed}: {outcome.text}"


def attempt(start, folder) -> str:
    return fuzz.attempt(fuzz.Target("x", lambda draw, place: start, 1), 0, folder).kind


def refuse():
    raise UserError("x.yaml: line 3 is wrong; mend it")


def say_little():
    raise UserError("bad input")


def exit_with_a_traceback():
    raise SystemExit(1)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (lambda: None, "accepted"),
        (lambda: 0, "accepted"),
        (refuse, "refused"),
        (say_little, "failed"),
        (lambda: 1, "failed"),
        (exit_with_a_traceback, "failed"),
        (lambda: {}["x"], "failed"),
        (lambda: [0] * 10**12, "failed"),
    ],
)
def test_what_counts_as_a_failure(start, kind, tmp_path):
    assert attempt(start, tmp_path) == kind


def test_a_hang_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert attempt(lambda: time.sleep(30), tmp_path) == "failed"


def test_a_changed_input_is_a_failure(tmp_path):
    def damage(draw, folder):
        (folder / "given").write_text("x")
        return lambda: (folder / "given").write_text("y") and None

    assert fuzz.attempt(fuzz.Target("x", damage, 1), 0, tmp_path).kind == "failed"


def test_an_attempt_can_be_repeated(tmp_path):
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        TARGETS[0].damage(fuzz.random.Random("recipe 7"), tmp_path / name)
        contents.append((tmp_path / name / "mine.yaml").read_bytes())
    assert contents[0] == contents[1]
