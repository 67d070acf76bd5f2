"""Logit-KD from a served teacher's likeliest tokens: the training that its own logits would give at temperature 1."""

import json
import logging
import time

import pytest
import tiny_setting
import torch
from completion_server import model_answers, serve_teacher, serving
from conftest import make_model
from tiny_setting import logged, make_form, weights

from medistill_trl import methods, pipeline
from medistill_trl.arguments import DataArguments, RunArguments, StudentArguments, TeacherArguments
from medistill_trl.errors import UserError
from medistill_trl.heldout import HeldoutCheck
from medistill_trl.inputs import Loaded
from medistill_trl.prompts import IGNORED
from medistill_trl.setting import Arguments, logits_folder
from medistill_trl.teacher import completion_logits
from medistill_trl.teacher_server import API_KEY, ServerLost, TeacherServer

K = 16
NAMES = (
    "loss", "kl_nats", "ce_nats", "divergence_nats", "top1", "teacher_entropy_nats", "teacher_tail_mass"
)  # fmt: skip


def make_setting(folder, extra_tokens=0, **training):
    """A teacher that may have more tokens than the student, as Meditron has."""
    teacher_form = make_form()
    teacher_form.tokenizer.add_tokens([f"<extra {n}>" for n in range(extra_tokens)])
    teacher_model = make_model(len(teacher_form.tokenizer), seed=1)
    options = {"teacher_logits_top_k": K, "kd_temperature": 1.0, "max_steps": 3, **training}
    return tiny_setting.make_setting(
        folder,
        "logit_kd",
        teacher_form=teacher_form,
        teacher_model=teacher_model,
        teacher={"teacher_completions": "stored"},
        teacher_logits="stored",
        **options,
    )


def serve(server, setting) -> None:
    """Put the setting's teacher behind a server, the held-out check's too."""
    setting.teacher = serve_teacher(server, setting.teacher)
    prompts = setting.heldout.prompts
    setting.heldout = HeldoutCheck.prepare(
        setting.form, setting.teacher, prompts, setting.store, 10, None
    )


def answers_of(setting, **limits):
    return model_answers(setting.teacher.model, setting.teacher.tokenizer, **limits)


def reads(server) -> list[dict]:
    """Requests for log-probabilities."""
    return [body for body in server.asked if "prompt_logprobs" in body]


# --- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("extra_tokens", "top_k"), [(0, K), (7, 10**6)], ids=["few", "all"])
def test_the_loss_and_the_student_are_those_of_the_local_teachers_store(
    tmp_path, extra_tokens, top_k
):
    """The two round a little differently: losses agree to 1e-4 of themselves."""
    local = make_setting(tmp_path / "local", extra_tokens, teacher_logits_top_k=top_k)
    _, expected, _ = tiny_setting.train(local)
    setting = make_setting(tmp_path / "served", extra_tokens, teacher_logits_top_k=top_k)
    with serving(answers_of(setting)) as server:
        serve(server, setting)
        setting, trainer, before = tiny_setting.train(setting)
    assert not weights(setting).equal(torch.cat([p.flatten() for p in before.values()]))
    for name in NAMES:
        assert logged(trainer, name) == pytest.approx(logged(expected, name), rel=1e-4, abs=1e-6), (
            name
        )
    torch.testing.assert_close(weights(setting), weights(local), rtol=1e-3, atol=1e-5)
    assert setting.totals.trained == local.totals.trained
    assert {body["prompt_logprobs"] for body in reads(server)} >= {min(top_k, 600)}


def test_what_a_server_said_is_not_mixed_with_what_the_model_says(tmp_path):
    tiny_setting.train(make_setting(tmp_path))
    setting = make_setting(tmp_path)
    with serving(answers_of(setting)) as server:
        serve(server, setting)
        trainer = methods.load("logit_kd").build(setting)
        asked = len(reads(server))
        # Once stored, no server need answer.
        serve_again = make_setting(tmp_path)
        serve(server, serve_again)
        methods.load("logit_kd").build(serve_again)
        assert len(reads(server)) == asked == len(trainer.train_dataset)
    folders = logits_folder(setting.store).glob("*/kept.json")
    teachers = [json.loads(path.read_text())["teacher"] for path in folders]
    assert sorted(teachers) == ["sha256:tiny served as tiny", "t"]


def test_many_questions_are_under_way_at_a_time(tmp_path):
    setting = make_setting(tmp_path)
    with serving(answers_of(setting)) as server:
        serve(server, setting)
        setting.stored_completions(1)
        server.faults, server.most = [0.2] * 8, 0
        methods.load("logit_kd").build(setting)
        assert server.most == setting.teacher.server.in_flight == 4


def test_a_server_lost_while_it_is_asked_keeps_what_it_said_and_the_next_asks_for_the_rest(
    tmp_path,
):
    straight = make_setting(tmp_path / "straight")
    with serving(answers_of(straight)) as server:
        serve(server, straight)
        tiny_setting.train(straight)
        needed = len(reads(server))
    lost = make_setting(tmp_path / "lost")
    with serving(answers_of(lost)) as server:
        serve(server, lost)
        lost.stored_completions(1)
        lost.teacher.server.wait = 0.2
        # One at a time: else an answer on its way when the server dies may or may not arrive.
        lost.teacher.server.in_flight = 1
        server.answers_left = 5
        with pytest.raises(ServerLost, match="start it again"):
            methods.load("logit_kd").build(lost)
    again = make_setting(tmp_path / "lost")
    with serving(answers_of(again)) as server:
        serve(server, again)
        tiny_setting.train(again)
        assert len(reads(server)) == needed - 5
    assert weights(again).equal(weights(straight))


# --- tokens the student lacks ----------------------------------------------------------------------


def test_tokens_that_the_student_lacks_are_taken_out_and_others_asked_for(tmp_path):
    """Of a teacher that finds nine tokens likely which the student lacks."""
    setting = make_setting(tmp_path, extra_tokens=9)
    teacher, shared = setting.teacher, setting.heldout.shared
    with torch.no_grad():
        teacher.model.lm_head.weight[shared:] *= 4
    prompt = teacher.form.encode("Hello")
    completions = [list(range(40 * n, 40 * n + 3 + n)) for n in range(5)]
    examples = [
        {"input_ids": prompt + c, "labels": [IGNORED] * len(prompt) + c} for c in completions
    ]
    with serving(answers_of(setting)) as server:
        served = serve_teacher(server, teacher)
        found = dict(entry for part in served.top_log_probs(examples, 5, shared) for entry in part)
        asked = {}
        for body in server.asked:
            asked.setdefault(tuple(body["prompt"]), []).append(body["prompt_logprobs"])
    assert max(map(len, asked.values())) > 1
    for place, (completion, example) in enumerate(zip(completions, examples, strict=True)):
        times = asked[tuple(example["input_ids"])]
        assert times == sorted(set(times))
        assert times[0] == 5
        log_probs = completion_logits(teacher.model, prompt, completion).log_softmax(-1)
        values, ids = log_probs.topk(times[-1])
        known = (values.exp() * (ids >= shared)).sum(1, keepdim=True)
        assert known.max() > 0.05
        kept = log_probs[:, :shared].topk(5)
        assert found[place].ids.equal(kept.indices)
        expected = kept.values - (1 - known).log()
        torch.testing.assert_close(found[place].log_probs, expected, atol=1e-5, rtol=0)
        tails = (1 - expected.exp().sum(1, keepdim=True)).log()
        torch.testing.assert_close(found[place].log_tails, tails, atol=1e-4, rtol=0)


def test_what_is_not_known_of_tokens_that_the_student_lacks_is_said_once(tmp_path, caplog):
    setting = make_setting(tmp_path)
    with serving(answers_of(setting)) as server:
        served = serve_teacher(server, setting.teacher)

        def said(vocab_size):
            with caplog.at_level(logging.WARNING):
                list(served.top_log_probs([{"input_ids": [5, 6], "labels": [5, 6]}], 2, vocab_size))
            return caplog.text

        assert said(600) == ""
        said(597)
        said(597)
    assert caplog.text.count("the 3 that the student lacks are taken out where") == 1


def test_a_completion_without_tokens_is_not_asked_for(tmp_path):
    setting = make_setting(tmp_path)
    with serving(answers_of(setting)) as server:
        served = serve_teacher(server, setting.teacher)
        examples = [{"input_ids": [5, 6], "labels": [IGNORED] * 2}]
        ((_, found),) = next(served.top_log_probs(examples, K, 600))
        assert server.asked == []
    assert [tuple(column.shape) for column in found] == [(0, K), (0, K), (0, 1)]


# --- refusals --------------------------------------------------------------------------------------


def arguments(url="http://h:1", **training) -> Arguments:
    teacher = TeacherArguments("t", teacher_backend="server", teacher_url=url)
    config = methods.load("logit_kd").config(output_dir="o", use_cpu=True, bf16=False, **training)
    return Arguments(
        RunArguments("logit_kd"), StudentArguments("s"), teacher, DataArguments("t", "v"), config
    )


@pytest.mark.parametrize(
    ("training", "named", "not_named"),
    [
        ({}, ["teacher_logits: stored, got online", "kd_temperature: 1.0, got 2.0"], []),
        ({"kd_temperature": 1.0}, ["teacher_logits: stored"], ["kd_temperature"]),
        ({"teacher_logits": "stored"}, ["kd_temperature: 1.0"], ["teacher_logits"]),
    ],
)
def test_other_settings_are_refused_by_name_with_what_to_do(training, named, not_named):
    with pytest.raises(UserError) as refused:
        pipeline.check_inputs(methods.load("logit_kd"), arguments(**training))
    message = str(refused.value)
    for part in [*named, "teacher_backend: local", "bond, cot, on_policy, ppo, sft, spin"]:
        assert part in message
    for part in not_named:
        assert part not in message


def check(url, teacher_form=None, **training) -> None:
    """What is refused before any weights are loaded."""
    form = make_form()
    server = TeacherServer(url, "tiny", timeout=5, wait=30, in_flight=4)
    loaded = Loaded(None, None, form, teacher_form or form, [], [], [], server)
    given = arguments(url, teacher_logits="stored", kd_temperature=1.0, **training)
    methods.load("logit_kd").check(given, loaded)


def test_a_server_that_gives_too_little_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    setting = make_setting(tmp_path)
    answer = answers_of(setting, max_logprobs=20)
    with serving(answer) as server:
        check(server.url, teacher_logits_top_k=20)
        with pytest.raises(
            UserError, match=r"HTTP 400.*asked for 64 prompt_logprobs.*--max-logprobs"
        ):
            check(server.url)
        with pytest.raises(
            UserError, match="set teacher_logits: online and teacher_backend: local"
        ):
            check(server.url, make_form(vocab_size=450))
        # One that gives what it likes, and the token that stands there.
        server.answer = lambda body: answer({**body, "prompt_logprobs": 5})
        with pytest.raises(UserError, match="gives 6 prompt_logprobs where 64 are asked for"):
            check(server.url)
        server.answer = lambda body: (200, {"choices": [{"text": "", "finish_reason": "length"}]})
        with pytest.raises(UserError, match="gives no prompt_logprobs"):
            check(server.url)
        server.key = "another"
        monkeypatch.setenv(API_KEY, "wrong")
        with pytest.raises(UserError, match="refuses the key") as refused:
            check(server.url)
        assert "max-logprobs" not in str(refused.value)
    # It is away: all that is needed may be stored, and nobody waits for it.
    start = time.monotonic()
    check(server.url)
    assert time.monotonic() - start < 15


def test_tokens_that_the_student_lacks_are_asked_for_beforehand(tmp_path):
    """Three of them may be among the likeliest, so the server has to give three more than are kept."""
    setting = make_setting(tmp_path, extra_tokens=3)
    with serving(answers_of(setting, max_logprobs=20)) as server:
        check(server.url, setting.teacher.form, teacher_logits_top_k=17)
        with pytest.raises(UserError, match="asked for 21 prompt_logprobs"):
            check(server.url, setting.teacher.form, teacher_logits_top_k=18)


def test_a_vocabulary_smaller_than_k_is_asked_for_whole(tmp_path):
    setting = make_setting(tmp_path)
    with serving(answers_of(setting, max_logprobs=600)) as server:
        check(server.url, teacher_logits_top_k=10**6)
        assert [body["prompt_logprobs"] for body in server.asked] == [600]
