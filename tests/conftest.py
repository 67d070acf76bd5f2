"""Tiny real models and tokenizers, made once per session, and the commands a user types.

Nothing here reaches the network: the hub is switched off for the tests and the processes they start.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CORES = sorted(os.sched_getaffinity(0))
if 1 < WORKERS <= len(CORES):
    # Tests side by side keep to cores of their own, and so do the processes they start: threads of two
    # that share a core wait for each other many times longer than they work.
    os.sched_setaffinity(0, CORES[WORKER::WORKERS])
    torch.set_num_threads(len(CORES[WORKER::WORKERS]))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would all that it starts; some tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    """Files that launch whole runs go first: begun last, one worker would end minutes after the other."""
    items.sort(key=lambda item: not item.path.name.startswith(("test_run", "test_demo")))


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    json.loads(line)["question"] + " " + json.loads(line)["reference"]
    for line in (ROOT / "data_prep/sample/processed/train.jsonl").read_text().splitlines()
]


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_tokenizer(
    vocab_size: int = 600, chat: bool = True, special: tuple[str, ...] = SPECIAL
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the packaged sample; pad equals EOS, as in SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def make_model(vocab_size: int, layers: int = 4, seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **overrides,
    )
    return LlamaForCausalLM(config)


def save_pair(
    folder: Path, vocab_size: int = 600, layers: int = 4, seed: int = 0, chat=True
) -> Path:
    tokenizer = make_tokenizer(vocab_size, chat)
    make_model(len(tokenizer), layers, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """A four-layer Llama with a chat template."""
    return save_pair(tmp_path_factory.mktemp("models") / "tiny-teacher")


@pytest.fixture(scope="session")
def other_teacher_folder(tmp_path_factory) -> Path:
    """A base model: another tokenizer, and no chat template."""
    folder = tmp_path_factory.mktemp("models") / "other-teacher"
    return save_pair(folder, vocab_size=450, seed=1, chat=False)


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory) -> Path:
    """Where converted models go; the embedded pair's, so that it is converted once per session."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MEDISTILL_CACHE"] = str(folder)
    return folder


def write_tiny_overlay(folder: Path, teacher_folder: Path) -> Path:
    """An overlay that puts the tiny pair into any recipe and keeps its output in `folder`."""
    overlay = folder / "tiny.yaml"
    content = {
        "teacher_model": str(teacher_folder),
        "teacher_dtype": "float32",
        "teacher_load_in_4bit": False,
        "student_model": str(teacher_folder),
        "student_keep_layers": [0, 3],
        "student_dtype": "float32",
        "student_load_in_4bit": False,
        "completion_store": str(folder / "completions.sqlite"),
        "teacher_max_new_tokens": 12,
        "teacher_temperature": 0.0,
        "max_prompt_tokens": 400,
        "max_length": 450,
        "max_train_samples": 16,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "bf16": False,
        "gradient_checkpointing": False,
        "output_dir": str(folder / "run"),
        "bond": {"num_samples": 4},
    }
    overlay.write_text(yaml.safe_dump(content))
    return overlay


@pytest.fixture
def tiny_overlay(tmp_path, teacher_folder, model_cache) -> Path:
    return write_tiny_overlay(tmp_path, teacher_folder)


def run_command(*words, timeout: int = 300, **kwargs) -> subprocess.CompletedProcess:
    """A command as a user types it, in the repository's root."""
    command = [str(word) for word in words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, **kwargs
    )


def launch_words(*arguments, config: str = "cpu.yaml") -> list[str]:
    """`accelerate launch recipes/run.py ...` with this Python's accelerate."""
    accelerate = Path(sys.executable).parent / "accelerate"
    config_path = ROOT / "accelerate_configs" / config  # an absolute path stays itself
    return [
        str(word)
        for word in (
            accelerate,
            "launch",
            "--config_file",
            config_path,
            "--main_process_port",
            29500 + WORKER,
            "recipes/run.py",
            *arguments,
        )
    ]


def launch(*arguments, config: str = "cpu.yaml", **kwargs) -> subprocess.CompletedProcess:
    return run_command(*launch_words(*arguments, config=config), **kwargs)


@pytest.fixture
def raw(tmp_path):
    """A copy of the packaged sample's releases, to change."""
    return shutil.copytree(ROOT / "data_prep/sample/raw", tmp_path / "raw")


@pytest.fixture(scope="session")
def sample_build(tmp_path_factory):
    """A build of the packaged sample, and its report."""
    from data_builds import build

    out = tmp_path_factory.mktemp("sample")
    code, report = build(out, "--sample")
    assert code == 0
    return out, report
