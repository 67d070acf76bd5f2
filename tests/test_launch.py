"""What the launcher was asked for, read from its own words."""

import pytest
from conftest import ROOT

from medistill_trl.errors import UserError
from medistill_trl.launch import Request, check_processes, read_request


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--num_processes 4 recipes/run.py --num_processes 9", Request(4)),
        ("--num-processes=2 --cpu recipes/run.py", Request(2, None, True)),
        ("--config_file accelerate_configs/cpu_ddp.yaml recipes/run.py", Request(2, None, True)),
        (
            "--config_file accelerate_configs/cpu_ddp.yaml --num_processes 3 recipes/run.py",
            Request(3, None, True),
        ),
        ("--config_file accelerate_configs/multi_gpu.yaml recipes/run.py", Request(2)),
        ("--use_deepspeed recipes/run.py", Request(None, "DEEPSPEED")),
        ("recipes/run.py recipes/sft.yaml", Request()),
    ],
)
def test_flags_and_config_file(words, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "accelerate.commands.config.default_config_file", str(tmp_path / "none.yaml")
    )
    assert read_request(words.split()) == expected


def test_another_count_or_engine_is_refused():
    check_processes(Request(), 1, "NO")
    check_processes(Request(2, "DEEPSPEED"), 2, "DEEPSPEED")
    with pytest.raises(UserError, match="asked for 2 processes and started 1"):
        check_processes(Request(2), 1, "NO")
    with pytest.raises(UserError, match="asked for DEEPSPEED and runs MULTI_CPU"):
        check_processes(Request(2, "DEEPSPEED"), 2, "MULTI_CPU")
