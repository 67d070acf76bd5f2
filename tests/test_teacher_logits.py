"""What is kept of the teacher comes back within its bound, is made once, and survives what happens to a disk."""

import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch
from conftest import make_model
from safetensors import safe_open

from medistill_trl import disk, teacher_logits
from medistill_trl.errors import NonFinite, RunFailed, UserError
from medistill_trl.losses.top_k import TopK, largest
from medistill_trl.prompts import IGNORED
from medistill_trl.teacher import completion_logits
from medistill_trl.teacher_logits import Kept, TeacherLogits, in_batches, read_by

V, K, T = 300, 8, 2.0
KEPT = Kept.of("teacher-1", V, K, T)


def example(number: int, prompt: int = 3, completion: int = 6) -> dict:
    ids = [(7 * number + n) % V for n in range(prompt + completion)]
    labels = [IGNORED] * prompt + ids[prompt:]
    return {"teacher_input_ids": ids, "teacher_labels": labels}


EXAMPLES = [example(n, completion=6 + n % 3) for n in range(20)]


class Producer:
    """Distributions that follow from the tokens, at once; keeps what it was asked."""

    def __init__(self, kept=KEPT, delay=0.0):
        self.kept = kept
        self.delay = delay
        self.asked = []

    def __call__(self, examples):
        time.sleep(self.delay)
        self.asked += examples
        return [self.make(each) for each in examples]

    def make(self, each) -> TopK:
        tokens = sum(label != IGNORED for label in each["teacher_labels"])
        generator = torch.Generator().manual_seed(sum(each["teacher_input_ids"]))
        logits = 4 * torch.randn(tokens, self.kept.vocab_size, generator=generator)
        return largest(logits, self.kept.top_k, self.kept.temperatures)


def fill(folder, producer, examples=EXAMPLES, kept=KEPT):
    logits = TeacherLogits(folder, kept)
    return logits, logits.fill(examples, in_batches(producer, 4))


def files(folder):
    return sorted(folder.glob("*/*.safetensors"))


def test_what_comes_back_is_within_the_stated_bound(tmp_path):
    producer = Producer()
    logits, keys = fill(tmp_path, producer)
    for each, key in zip(EXAMPLES, keys, strict=True):
        want, got = producer.make(each), logits.get(key)
        assert got.ids.equal(want.ids)
        assert got.log_tails.equal(want.log_tails)
        bound = 1.3e-4 * want.log_probs.abs().sqrt() + 1e-8
        assert ((got.log_probs - want.log_probs).abs() <= bound).all()
    batch = logits.batch(keys[:3])
    assert [len(column) for column in batch] == [6 + 7 + 8] * 3
    assert batch.ids[6:13].equal(logits.get(keys[1]).ids)


def test_the_bound_holds_from_certain_to_hopeless():
    values = -torch.cat([torch.logspace(-9, 1.8, 5000), torch.tensor([0.0, 64.0, 80.0])])[:, None]
    rows = TopK(torch.zeros_like(values, dtype=torch.long), values, values)
    got = teacher_logits._unpack(teacher_logits._pack(rows, True)).log_probs
    wanted = values.clamp_min(-64)
    assert ((got - wanted).abs() <= 1.3e-4 * wanted.abs().sqrt() + 1e-8).all()
    assert got[-3].item() == 0


@pytest.mark.parametrize(("vocab_size", "per_id"), [(65_536, 2), (65_537, 3), (151_936, 3)])
def test_bytes_of_a_token(tmp_path, vocab_size, per_id):
    kept = Kept.of("t", vocab_size, 64, T)
    each = example(1, completion=40)
    ids = torch.arange(vocab_size - 40 * 64, vocab_size).reshape(40, 64)
    top_k = TopK(ids, torch.full((40, 64), -5.0), torch.full((40, 2), -1.0))
    logits, keys = fill(tmp_path, lambda _: [top_k], [each], kept)
    assert logits.get(keys[0]).ids.equal(ids)
    index = logits.num_bytes - logits.num_tokens * (64 * (per_id + 2) + 2 * 4)
    assert 0 < index < 600  # a header, and 36 bytes a completion


def test_the_second_run_asks_for_nothing(tmp_path):
    logits, keys = fill(tmp_path, Producer())
    again = Producer()
    second, same = fill(tmp_path, again)
    assert again.asked == []
    assert same == keys
    assert second.get(keys[5]).log_probs.equal(logits.get(keys[5]).log_probs)
    assert len(second) == len(EXAMPLES)
    more = Producer()
    third, _ = fill(tmp_path, more, [*EXAMPLES, example(99)])
    assert more.asked == [example(99)]
    assert len(third) == len(EXAMPLES) + 1


def test_anything_the_distributions_depend_on_is_another_address(tmp_path):
    fill(tmp_path, Producer())
    others = [
        Kept.of("teacher-2", V, K, T),
        Kept.of("teacher-1", V - 1, K, T),
        Kept.of("teacher-1", V, K + 1, T),
        Kept.of("teacher-1", V, K, 1.0),
    ]
    for kept in others:
        producer = Producer(kept)
        fill(tmp_path, producer, kept=kept)
        assert len(producer.asked) == len(EXAMPLES), kept
    # The same tokens, but another part of them is the completion.
    moved = example(0, prompt=4, completion=5)
    assert moved["teacher_input_ids"] == EXAMPLES[0]["teacher_input_ids"]
    producer = Producer()
    fill(tmp_path, producer, [moved])
    assert producer.asked == [moved]


def test_each_is_made_once_and_the_longest_first(tmp_path):
    producer = Producer()
    _, keys = fill(tmp_path, producer, [*EXAMPLES, *EXAMPLES[:4]])
    lengths = [len(each["teacher_input_ids"]) for each in producer.asked]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == len(EXAMPLES)
    assert keys[-4:] == keys[:4]


def test_several_files_hold_each_completion_once(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_logits, "CHUNK_TOKENS", 40)
    logits, keys = fill(tmp_path, Producer())
    lengths = [safe_open(path, framework="numpy").get_tensor("lengths") for path in files(tmp_path)]
    assert len(lengths) > 1
    assert sum(map(len, lengths)) == len(EXAMPLES)
    assert logits.num_tokens == sum(len(logits.get(key).ids) for key in keys)


def test_a_completion_without_tokens_has_no_rows(tmp_path):
    logits, keys = fill(tmp_path, Producer(), [example(0, completion=0), example(1)])
    assert [len(column) for column in logits.get(keys[0])] == [0] * 3
    assert len(logits.get(keys[1]).ids) == 6


def _fill_slowly(folder, delay):
    teacher_logits.CHUNK_TOKENS = 1  # a file for each batch of 4
    fill(folder, Producer(delay=delay))


def start_filling(folder, delay, until):
    # Forked, not spawned: importing torch would take longer than the test.
    process = multiprocessing.get_context("fork").Process(target=_fill_slowly, args=(folder, delay))
    process.start()
    deadline = time.monotonic() + 120
    while len(files(folder)) < until and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_a_kill_loses_at_most_the_file_in_the_making(tmp_path):
    process = start_filling(tmp_path, 0.3, until=2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    whole = files(tmp_path)
    assert 2 <= len(whole) < 5
    torn = whole[0].with_name(whole[0].name + ".1.partial")
    torn.write_bytes(b"half")
    producer = Producer()
    logits, keys = fill(tmp_path, producer)
    assert len(producer.asked) == len(EXAMPLES) - 4 * len(whole)
    assert all(
        logits.get(key).ids.equal(producer.make(each).ids)
        for each, key in zip(EXAMPLES, keys, strict=True)
    )
    assert not torn.exists()


def test_two_runs_side_by_side_make_nothing_twice(tmp_path):
    process = start_filling(tmp_path, 0.2, until=1)
    producer = Producer()
    fill(tmp_path, producer)  # waits its turn
    process.join()
    assert process.exitcode == 0
    assert producer.asked == []


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    fill(tmp_path, Producer())
    path = files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(UserError, match=rf"{path.name}.* remove it, and the teacher reads"):
        fill(tmp_path, Producer())
    path.unlink()
    producer = Producer()
    fill(tmp_path, producer)
    assert len(producer.asked) == len(EXAMPLES)


def test_a_full_disk_is_said_in_words_and_loses_nothing(tmp_path, request, monkeypatch):
    fill(tmp_path, Producer(), EXAMPLES[:2])
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    with (
        pytest.raises(RunFailed, match=r"File too large .*continue with --resume"),
        disk.explained(tmp_path, how_to_go_on="continue with --resume"),
    ):
        fill(tmp_path, Producer())
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == before
    producer = Producer()
    fill(tmp_path, producer)
    assert len(producer.asked) == len(EXAMPLES) - 2


def test_what_is_not_finite_or_of_another_shape_is_not_kept(tmp_path):
    def broken(examples):
        made = Producer()(examples)
        made[0].log_tails[0, 0] = float("nan")
        return made

    with pytest.raises(NonFinite, match="teacher-1: its log-probabilities"):
        fill(tmp_path, broken)
    short = Producer(Kept.of("teacher-1", V, K - 1, T))
    with pytest.raises(ValueError, match=r"the producer gave .* are kept"):
        fill(tmp_path, short)
    assert files(tmp_path) == []


@pytest.mark.parametrize("chunk_size", [3, 256])
def test_the_teacher_reads_what_its_logits_say(chunk_size):
    """Also with rows beyond the shared vocabulary, in a padded batch."""
    model = make_model(V + 5, seed=3).eval()
    batch = [example(0), example(1, prompt=5, completion=2), example(2, completion=0)]
    for each, found in zip(batch, read_by(model, KEPT, batch, chunk_size), strict=True):
        labels = each["teacher_labels"]
        split = sum(label == IGNORED for label in labels)
        ids = each["teacher_input_ids"]
        logits = completion_logits(model, ids[:split], ids[split:])[:, :V]
        log_probs = logits.log_softmax(-1)
        want = log_probs.topk(K)
        assert found.ids.equal(want.indices)
        torch.testing.assert_close(found.log_probs, want.values, rtol=1e-4, atol=1e-5)
        for column, temperature in enumerate(KEPT.temperatures):
            soft = (log_probs / temperature).exp()
            tail = soft.sum(-1) - soft.gather(1, want.indices).sum(-1)
            torch.testing.assert_close(found.log_tails[:, column], tail.log(), rtol=1e-4, atol=1e-4)
