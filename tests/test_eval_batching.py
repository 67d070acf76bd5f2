"""Batches: as large as fits."""

import pytest
import torch

from eval.batching import BatchSize
from medistill_trl.errors import RunFailed


def test_the_batch_is_halved_until_it_fits_and_stays_so():
    asked = []

    def work(items):
        asked.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [item * 10 for item in items]

    size = BatchSize(16, fixed=False)
    assert size.map(work, list(range(7))) == [item * 10 for item in range(7)]
    assert size.size == 2
    assert asked == [7, 7, 4, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("size", "advice"),
    [
        (16, "choose a smaller --batch_size, or load the models in fewer bits"),
        (1, "load the models in fewer bits"),
    ],
)
def test_what_to_do_when_a_fixed_batch_does_not_fit(size, advice):
    def work(items):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(RunFailed) as refusal:
        BatchSize(size, fixed=True).map(work, list(range(7)))
    assert str(refusal.value) == f"out of memory at batch size {size}; {advice}"


def test_another_error_is_not_taken_for_memory():
    def work(items):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        BatchSize(4, fixed=False).map(work, [1])


def test_auto_is_a_fixed_size_on_cpu():
    assert BatchSize.of(None, torch.device("cpu")) == BatchSize(1, fixed=False)
    assert BatchSize.of(None, torch.device("cpu"), writing=True) == BatchSize(16, fixed=False)
    assert BatchSize.of(3, torch.device("cpu")) == BatchSize(3, fixed=True)
