"""Every completion is drawn exactly once, whatever happens."""

import multiprocessing
import os
import signal
import sqlite3
import time

import pytest

from medistill_trl.completion_store import CompletionStore
from medistill_trl.errors import UserError
from medistill_trl.teacher import Completion, Sampling
from medistill_trl.writer import Writer

PROMPTS = [f"prompt {'x' * (i % 7)} {i}" for i in range(40)]


class CountingTeacher(Writer):
    """Answers at once and keeps what it was asked: the store's side of the bargain is what is tested."""

    def __init__(self, identity="teacher-1", delay=0.0):
        self.identity = identity
        self.delay = delay
        self.batches = []

    def complete(self, prompts, sampling, seed):
        time.sleep(self.delay)
        self.batches.append(list(prompts))
        return [Completion(f"answer to {p} ({len(self.batches)})", [1, 2], True) for p in prompts]

    @property
    def asked(self):
        return [prompt for batch in self.batches for prompt in batch]


def draw(path, teacher, sampling=None, samples=1, prompts=PROMPTS):
    return CompletionStore(path).draw(teacher, prompts, sampling or Sampling(8), samples, 8)


def test_the_second_run_makes_no_teacher_call(tmp_path):
    path = tmp_path / "deep/er/c.sqlite"
    first = draw(path, CountingTeacher())
    again = CountingTeacher()
    assert draw(path, again) == first
    assert again.asked == []
    assert [c[0].text.split(" (")[0] for c in first] == [f"answer to {p}" for p in PROMPTS]


def test_anything_that_changes_the_draw_is_another_address(tmp_path):
    path = tmp_path / "c.sqlite"
    draw(path, CountingTeacher())
    for teacher, sampling, samples in (
        (CountingTeacher("teacher-2"), Sampling(8), 1),
        (CountingTeacher(), Sampling(9), 1),
        (CountingTeacher(), Sampling(8, 0.7), 1),
    ):
        draw(path, teacher, sampling, samples)
        assert sorted(teacher.asked) == sorted(PROMPTS)
    teacher = CountingTeacher()
    drawn = draw(path, teacher, samples=3)
    assert sorted(teacher.asked) == sorted(PROMPTS * 2)  # the first of three is there already
    assert all(len(samples) == 3 for samples in drawn)


def test_what_drawing_took_is_kept_with_each_completion(tmp_path):
    path = tmp_path / "c.sqlite"
    drawn = draw(path, CountingTeacher(delay=0.02), prompts=PROMPTS[:9])  # in batches of 8 and 1
    seconds = [group[0].seconds for group in drawn]
    assert 0.04 <= sum(seconds) < 0.4
    assert sorted(seconds)[7] < max(seconds) / 2  # of a batch each has its share
    assert [g[0].seconds for g in draw(path, CountingTeacher(), prompts=PROMPTS[:9])] == seconds


def test_a_store_of_an_earlier_version_is_read_on(tmp_path):
    path = tmp_path / "c.sqlite"
    first = draw(path, CountingTeacher(), prompts=["a"])
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE completions DROP COLUMN seconds")
    teacher = CountingTeacher()
    again = draw(path, teacher, prompts=["a", "b"])
    assert teacher.asked == ["b"]
    assert again[0] == first[0]
    assert again[0][0].seconds is None
    assert again[1][0].seconds > 0


def test_a_prompt_that_stands_twice_is_drawn_once(tmp_path):
    teacher = CountingTeacher()
    drawn = draw(tmp_path / "c.sqlite", teacher, prompts=["a", "b", "a"])
    assert sorted(teacher.asked) == ["a", "b"]
    assert drawn[0] == drawn[2]


def test_batches_are_sorted_by_length_longest_first(tmp_path):
    teacher = CountingTeacher()
    draw(tmp_path / "c.sqlite", teacher)
    lengths = [len(p) for p in teacher.asked]
    assert lengths == sorted(lengths, reverse=True)
    assert {len(batch) for batch in teacher.batches} == {8}


def _draw_slowly(path, delay):
    draw(path, CountingTeacher(delay=delay))


def test_a_prompt_is_not_padded_to_more_than_twice_its_length(tmp_path):
    teacher = CountingTeacher()
    draw(tmp_path / "c.sqlite", teacher, prompts=["x" * n for n in (2, 5, 30, 4, 16, 15, 14)])
    assert [[len(prompt) for prompt in batch] for batch in teacher.batches] == [
        [30, 16, 15],
        [14],
        [5, 4],
        [2],
    ]


def test_a_kill_loses_at_most_the_batch_in_the_making(tmp_path):
    path = tmp_path / "c.sqlite"
    process = multiprocessing.get_context("spawn").Process(target=_draw_slowly, args=(path, 0.3))
    process.start()
    deadline = time.monotonic() + 120
    while not (path.exists() and _count(path) >= 16) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = _count(path)
    assert 16 <= kept < len(PROMPTS)
    teacher = CountingTeacher()
    draw(path, teacher)
    assert len(teacher.asked) == len(PROMPTS) - kept


def _count(path):
    try:
        with sqlite3.connect(path) as database:
            return database.execute("SELECT count(*) FROM completions").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_two_runs_side_by_side_draw_nothing_twice(tmp_path):
    path = tmp_path / "c.sqlite"
    process = multiprocessing.get_context("spawn").Process(target=_draw_slowly, args=(path, 0.2))
    process.start()
    deadline = time.monotonic() + 120
    while not (path.exists() and _count(path) >= 8) and time.monotonic() < deadline:
        time.sleep(0.02)
    teacher = CountingTeacher()
    draw(path, teacher)  # waits its turn
    process.join()
    assert process.exitcode == 0
    assert teacher.asked == []


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes, nothing else " * 100)
    with pytest.raises(UserError, match="set completion_store to another path"):
        CompletionStore(path)
    assert path.read_text().startswith("my notes")
