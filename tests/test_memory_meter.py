"""The bytes that tensors without content would take."""

import pytest
import torch

from medistill_trl.memory.meter import Meter


def test_the_meter_counts_what_is_alive_and_forgets_the_rest():
    with Meter() as meter:
        with meter.label("kept"):
            kept = torch.empty(1000)
        meter.begin("now")
        with meter.label("passing"):
            twice = torch.empty(500) + 1
            view = kept[:10].view(2, 5)
        assert meter.peaks["now"] == {"kept": 4000, "passing": 4000}
        meter.begin("later")
        assert meter.peaks["later"] == {"kept": 4000, "passing": 2000}
        del twice
        meter.relabel(view, "renamed")
        meter.begin("last")
    assert meter.peaks["last"] == {"kept": 0, "passing": 0, "renamed": 4000}


def test_the_meter_counts_what_backward_will_need():
    with Meter() as meter, meter.label("floats"):
        weight = torch.empty(100, 100, requires_grad=True)
        x = torch.empty(50, 100)
        y = (x @ weight).exp()
        meter.begin("graph")
        loss = y.sum()
        del x, y
        meter.begin("kept")
        loss.backward()
    assert meter.peaks["graph"]["floats"] == pytest.approx(40000 + 3 * 20000 - 20000, abs=100)
    assert meter.peaks["kept"]["floats"] > 40000 + 20000 + 20000


def test_masks_decide_shapes_as_in_training():
    with Meter() as meter, meter.label("floats"):
        states = torch.empty(2, 5, 8)
        mask = torch.ones(2, 5, dtype=torch.long)
        mask[0, 3:] = 0
        chosen = states[mask.bool()]
    assert chosen.shape == (8, 8)
    assert mask.sum().item() == 8
