"""What `make demo` promises, measured: slow, so run by `make test-all` only."""

import json
import os
import resource
import time

import pytest
from conftest import launch

pytestmark = pytest.mark.slow


def test_the_demo_halves_the_divergence_in_time_and_memory(tmp_path):
    """From an empty model cache: under 10 minutes, under 4 GB, and held-out KL under half."""
    environment = {**os.environ, "MEDISTILL_CACHE": str(tmp_path / "cache")}
    flags = ["--output_dir", tmp_path / "demo", "--completion_store", tmp_path / "c.sqlite"]
    start = time.monotonic()
    result = launch(
        "recipes/sft.yaml", "recipes/overlays/embedded.yaml", *flags, timeout=1200, env=environment
    )
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stderr[-4000:]
    record = json.loads((tmp_path / "demo/results/run.json").read_text())
    heldout = record["heldout"]
    assert heldout["after"]["kl_nats"] < heldout["before"]["kl_nats"] / 2
    assert heldout["after"]["top1"] > heldout["before"]["top1"]
    assert seconds < 600
    assert record["peak_host_memory_gb"] < 4
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    assert children < 4
