"""How much of the completions is compared across tokenizers, and the warning where it is little."""

import pytest
import torch

from medistill_trl.coverage import Coverage
from medistill_trl.rollouts import Sample, summary
from medistill_trl.teacher import Completion


def test_the_share_of_samples_is_over_all_their_tokens():
    drawn = [Sample("Why?", Completion("x", [1] * n, finished=False)) for n in (6, 2, 0)]
    found = summary(drawn, torch.zeros(3), {}, {}, tokens_in_spans=[3, 2, 0])
    assert found["span_share"] == pytest.approx(5 / 8)
    assert "span_share" not in summary(drawn, torch.zeros(3), {}, {})


def test_low_coverage_is_said_once_and_by_one_process(caplog):
    means = {"span_share": 0.25, "loss": 0.1}
    one, other = Coverage(0.3, says=True), Coverage(0.3, says=False)
    for _ in range(2):
        one.check(means | {"span_share": 0.3})
        one.check({"loss": 0.1})
    assert not caplog.records
    for _ in range(2):
        one.check(means)
        other.check(means)
    (said,) = caplog.records
    assert "span_share 0.25, below min_coverage 0.3" in said.getMessage()
