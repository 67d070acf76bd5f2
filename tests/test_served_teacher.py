"""A teacher behind a server is the same teacher: its completions, its log-probabilities, what is trained on them."""

import pytest
import tiny_setting
import torch
from completion_server import model_answers, serve_teacher, serving
from conftest import make_model
from tiny_setting import make_form

from medistill_trl import methods, pipeline
from medistill_trl.arguments import DataArguments, RunArguments, StudentArguments, TeacherArguments
from medistill_trl.checkpoints import newest_valid
from medistill_trl.completion_store import CompletionStore
from medistill_trl.dry_run import print_plan
from medistill_trl.errors import UserError
from medistill_trl.heldout import HeldoutCheck
from medistill_trl.inputs import Loaded
from medistill_trl.model_source import ModelSource
from medistill_trl.models import set_generation
from medistill_trl.prompts import IGNORED, encode_example
from medistill_trl.recipe import Recipe
from medistill_trl.served_teacher import ServedTeacher
from medistill_trl.setting import Arguments
from medistill_trl.teacher import Sampling, Teacher, completion_logits
from medistill_trl.teacher_server import ServerLost, TeacherServer

QUESTIONS = [f"What causes condition number {n}?" + " Explain." * (n % 3) for n in range(6)]


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "plain"])
def pair(request):
    """A local teacher, and the same one served."""
    form = make_form(chat=request.param)
    model = make_model(len(form.tokenizer), seed=1).eval().requires_grad_(False)
    set_generation(model, form.tokenizer)
    local = Teacher(model, form.tokenizer, form, "t")
    with serving(model_answers(model, form.tokenizer)) as server:
        yield local, serve_teacher(server, local), server


def rendered(teacher):
    return [teacher.form.render(question) for question in QUESTIONS]


# --- completions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [3, 40])
def test_greedy_completions_are_those_of_a_local_teacher(pair, longest):
    local, served, _ = pair
    before = served.generated_tokens
    found = served.complete(rendered(served), Sampling(longest))
    assert found == local.complete(rendered(local), Sampling(longest))
    assert served.generated_tokens - before == sum(c.num_tokens for c in found)


def test_an_end_token_and_a_stop_string_end_a_completion_as_they_do_locally(pair):
    """A tiny model hardly ever writes either: here the server's answers are written by hand."""
    _local, served, _server = pair
    tokenizer = served.tokenizer
    cut_at = tokenizer("An answer.\n### Question:")["input_ids"]
    ended = [*tokenizer("An answer.")["input_ids"], 2]
    cases = {
        "ended": ({"token_ids": ended, "finish_reason": "stop"}, 2),
        "not returned": ({"token_ids": ended[:-1], "finish_reason": "stop", "stop_reason": 2}, 2),
        "text alone": ({"finish_reason": "stop"}, None if served.form.stop_strings else 2),
        "limit": ({"token_ids": ended[:-1], "finish_reason": "length"}, None),
    }
    if served.form.stop_strings:
        cases["stop"] = (
            {"token_ids": cut_at, "finish_reason": "stop", "stop_reason": "\n###"},
            None,
        )
    for name, (choice, end_id) in cases.items():
        read = served._read({"text": "An answer.", **choice})
        assert (read.text, read.end_id, read.finished) == ("An answer.", end_id, name != "limit"), (
            name
        )
        assert tokenizer.decode(read.token_ids) == "An answer."


def test_the_server_writes_no_further_than_an_end_token(pair):
    """Whatever follows would be cut, and paid for."""
    local, served, server = pair
    prompt = rendered(local)[0]
    ids = local.complete([prompt], Sampling(12))[0].token_ids
    end, told, answer = ids[4], [], server.answer
    ends = ServedTeacher(
        served.server, served.source, served.tokenizer, served.form, [end], served.device
    )

    def overheard(body):
        status, content = answer(body)
        told.append(content["choices"][0]["token_ids"])
        return status, content

    server.answer = overheard
    (found,) = ends.complete([prompt], Sampling(12))
    server.answer = answer
    first = ids.index(end)
    assert told == [ids[: first + 1]]
    assert (found.token_ids, found.end_id, found.finished) == (ids[:first], end, True)


def test_a_sampled_completion_depends_on_its_seed_alone(pair):
    _, served, server = pair
    sampling = Sampling(12, temperature=1.0, top_p=0.9, top_k=50)
    prompts = rendered(served)
    first = served.complete(prompts, sampling, seed=2**63 + 7)  # more than a server takes
    assert served.complete(prompts, sampling, seed=2**63 + 7) == first
    assert served.complete(prompts[3:5], sampling, seed=2**63 + 10) == first[3:5]
    assert served.complete(prompts, sampling, seed=1) != first
    body = server.asked[-1]
    assert (body["top_p"], body["top_k"], body["repetition_penalty"]) == (0.9, 50, 1.0)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    served.complete(prompts[:1], sampling)
    assert torch.equal(torch.rand(2), expected)


def test_the_store_asks_a_server_once_and_for_the_same_draw_again(pair, tmp_path):
    _, served, server = pair
    sampling, prompts = Sampling(8, temperature=1.0), rendered(served)
    drawn = CompletionStore(tmp_path / "a.sqlite").draw(served, prompts, sampling, 2)
    assert len({c.text for group in drawn for c in group}) > len(prompts)
    asked = len(server.asked)
    assert CompletionStore(tmp_path / "a.sqlite").draw(served, prompts, sampling, 2) == drawn
    assert len(server.asked) == asked
    again = CompletionStore(tmp_path / "b.sqlite").draw(served, prompts[::2], sampling, 2)
    assert again == drawn[::2]  # whatever else was asked for
    assert all(c.seconds > 0 for group in drawn for c in group)
    other = ServedTeacher(
        TeacherServer(server.url, "other", 1, 1, 1), served.source, served.tokenizer, served.form, [2], torch.device("cpu")
    )  # fmt: skip
    assert other.identity != served.identity == "sha256:tiny served as tiny"


def test_a_server_with_another_model_is_found_out(pair):
    _, served, _server = pair
    choice = {"text": "Hello there", "finish_reason": "length"}
    with pytest.raises(UserError, match="tokens that tiny does not have; teacher_model must"):
        served._read({**choice, "token_ids": [7, 10_000]})
    with pytest.raises(UserError, match=r"reads .* in the tokens of tiny; teacher_model must"):
        served._read({**choice, "token_ids": served.tokenizer("Goodbye")["input_ids"]})
    with pytest.raises(UserError, match="without text or finish_reason"):
        served._read({"text": "Hello"})


# --- log-probabilities -----------------------------------------------------------------------------


def examples_of(teacher):
    rows = [encode_example(teacher.form, q, "Because of an injury.", True, None) for q in QUESTIONS]
    return [*rows, {"input_ids": [5, 6], "labels": [IGNORED] * 2}]


def test_log_probs_of_completions_are_those_of_a_local_teacher(pair):
    local, served, _ = pair
    expected = local.completion_log_probs(examples_of(local))
    found = served.completion_log_probs(examples_of(served))
    assert [len(one) for one in found] == [len(one) for one in expected]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-5, rtol=0)


def likeliest(served, examples, k):
    parts = served.top_log_probs(examples, k, len(served.tokenizer))
    found = dict(entry for part in parts for entry in part)
    return [found[place] for place in range(len(examples))]


def test_the_likeliest_tokens_and_the_mass_of_the_others(pair):
    local, served, _server = pair
    pairs = [
        (served.form.encode(prompt), list(range(10 + n, 14 + 2 * n)))
        for n, prompt in enumerate(rendered(served))
    ]
    examples = [{"input_ids": p + c, "labels": [IGNORED] * len(p) + c} for p, c in pairs]
    vocab = len(served.tokenizer)
    for k in (1, 5, vocab):
        found = likeliest(served, examples, k)
        for (prompt, completion), top in zip(pairs, found, strict=True):
            log_probs = completion_logits(local.model, prompt, completion).log_softmax(-1)
            values, ids = log_probs.topk(k)
            torch.testing.assert_close(top.log_probs, values, atol=1e-5, rtol=0)
            assert top.ids[:, 0].equal(ids[:, 0])
            tail = (1 - values.double().exp().sum(-1)).clamp(min=1e-9).log()
            if k < vocab:
                torch.testing.assert_close(top.log_tails[:, 0], tail.float(), atol=1e-4, rtol=0)
            else:
                assert (top.log_tails < -80).all()
    assert found[0].ids.dtype == torch.int64
    assert (found[0].log_probs.dtype, found[0].log_tails.dtype) == (torch.float32,) * 2


def test_a_server_without_log_probs_says_so(pair):
    _, served, server = pair
    answer = server.answer
    server.answer = lambda body: (200, {"choices": [{"text": "", "finish_reason": "length"}]})
    with pytest.raises(UserError, match="gives no prompt_logprobs"):
        served.completion_log_probs(examples_of(served))
    server.answer = answer


def test_a_vocabulary_that_is_not_all_of_the_teachers_is_said_once(pair, caplog):
    _, served, _ = pair
    served.completion_log_probs(examples_of(served)[:1], vocab_size=len(served.tokenizer))
    assert caplog.text == ""
    for _ in range(2):
        served.completion_log_probs(examples_of(served)[:1], vocab_size=len(served.tokenizer) - 3)
    assert caplog.text.count("the 3 that the student lacks are not taken out") == 1


# --- training --------------------------------------------------------------------------------------

METHODS = {
    "sft": {},
    "cot": {"num_rationales": 1, "sampling_temperature": 0.0, "rationale_max_new_tokens": 10},
    "spin": {},
    "on_policy": {"num_generations": 2, "max_completion_length": 6, "reward": "token_kl"},
    "ppo": {
        "data": {"max_prompt_tokens": 100}, "max_completion_length": 6, "num_ppo_epochs": 1,
        "num_mini_batches": 2, "kl_coef": 0.0, "per_device_train_batch_size": 1,
    },
    "bond": {"num_samples": 4, "max_completion_length": 6},
}  # fmt: skip


def test_every_black_box_method_is_tried_with_a_server():
    assert sorted(METHODS) == methods.names("black_box")


@pytest.mark.parametrize("method", METHODS)
def test_a_served_teacher_trains_the_student_that_a_local_one_does(tmp_path, method):
    local = tiny_setting.make_setting(tmp_path / "local", method, **METHODS[method])
    tiny_setting.train(local)
    setting = tiny_setting.make_setting(tmp_path / "served", method, **METHODS[method])
    judge = setting.teacher
    with serving(model_answers(judge.model, judge.tokenizer)) as server:
        setting.teacher = serve_teacher(server, judge)
        prompts = setting.heldout.prompts
        setting.heldout = HeldoutCheck.prepare(
            setting.form, setting.teacher, prompts, setting.store, 10, None
        )
        setting, _, before = tiny_setting.train(setting)
    after = tiny_setting.weights(setting)
    assert not after.equal(torch.cat([p.flatten() for p in before.values()]))
    torch.testing.assert_close(after, tiny_setting.weights(local), atol=1e-5, rtol=0)


def test_the_held_out_check_measures_what_needs_no_logits_and_says_what_it_leaves_out(tmp_path):
    local = tiny_setting.make_setting(tmp_path, "sft")
    check, student = local.heldout, local.student
    expected = check.measure(student)
    with serving(model_answers(check.teacher.model, check.teacher.tokenizer)) as server:
        check.teacher = serve_teacher(server, check.teacher)
        sums = check.compare(student)
    measured = check.summary(sums)
    assert measured["kl_nats"] is None
    assert "KL is not measured" in measured["note"]
    for key in ("ce_nats", "top1", "bits_per_byte"):
        assert measured[key] == pytest.approx(expected[key])
    records = check.records(sums)
    assert {record["kl_nats"] for record in records} == {None}
    assert sum(record["agreed"] for record in records) == measured["top1"] * measured["tokens"]


def arguments(method, **teacher) -> Arguments:
    teacher = TeacherArguments("t", teacher_backend="server", teacher_url="http://h:1", **teacher)
    training = methods.load(method).config(output_dir="o", use_cpu=True, bf16=False)
    return Arguments(
        RunArguments(method), StudentArguments("s"), teacher, DataArguments("t", "v"), training
    )


@pytest.mark.parametrize("method", ["adakd", "attention", "fitnets"])
def test_a_method_that_looks_into_the_teacher_refuses_a_server_by_name(method):
    assert methods.load(method).teacher_access == "white_box"
    with pytest.raises(UserError, match=rf"teacher_backend: {method} needs .*: bond, cot, on_p"):
        pipeline.check_inputs(methods.load(method), arguments(method))


def test_a_dry_run_says_who_serves_the_teacher(capsys):
    form = make_form()
    config = make_model(len(form.tokenizer)).config
    source = ModelSource("tiny", "tiny", None, config, "tiny")
    reached = TeacherServer("http://h:1/v1", "tiny", 1, 1, 1)
    prompts = tiny_setting.PROMPTS
    loaded = Loaded(source, source, form, form, prompts, prompts, [], reached)
    print_plan(Recipe({"method": "sft"}), methods.load("sft"), arguments("sft"), loaded)
    shown = capsys.readouterr().out
    assert "http://h:1/v1 serves it as tiny; none of its weights are loaded here" in shown
    assert "student weights" in shown
    assert "teacher weights" not in shown


# --- a server that is lost -------------------------------------------------------------------------


def with_dropout(folder):
    """A run of two steps an epoch whose student has dropout."""
    form = make_form()
    student = make_model(len(form.tokenizer), layers=2, seed=2, attention_dropout=0.2)
    return tiny_setting.make_setting(
        folder, "sft", student=student, max_steps=4, save_strategy="steps", save_steps=100,
        eval_strategy="epoch", optim="adamw_torch",
    )  # fmt: skip


def train_with(setting, answers, checkpoint=None):
    """Train while a server answers so often, or always (None)."""
    judge = setting.teacher
    with serving(model_answers(judge.model, judge.tokenizer)) as server:
        server.answers_left = answers
        setting.teacher = serve_teacher(server, judge)
        setting.teacher.server.wait = 0.2
        trainer = pipeline.build_trainer(methods.load("sft"), setting)
        pipeline.train(trainer, setting.totals, checkpoint)


# Amid the first epoch, at the beginning of the second, and amid that step.
@pytest.mark.parametrize(("answers", "step"), [(6, 1), (8, 2), (10, 2)])
def test_a_lost_server_leaves_the_last_step_and_the_resumed_run_is_the_same(
    tmp_path, answers, step
):
    straight, lost = with_dropout(tmp_path / "straight"), with_dropout(tmp_path / "lost")
    trainer = pipeline.build_trainer(methods.load("sft"), straight)
    pipeline.train(trainer, straight.totals, None)
    with pytest.raises(ServerLost):
        train_with(lost, answers)
    checkpoint, passed_over = newest_valid(tmp_path / "lost/checkpoints")
    assert (checkpoint.name, passed_over) == (f"checkpoint-{step}", {})
    resumed = with_dropout(tmp_path / "lost")
    train_with(resumed, None, checkpoint)
    assert tiny_setting.weights(resumed).equal(tiny_setting.weights(straight))
    assert resumed.totals.trained == straight.totals.trained


def test_a_server_that_is_lost_before_the_first_step_leaves_nothing(tmp_path):
    with pytest.raises(ServerLost):
        train_with(with_dropout(tmp_path), 2)
    assert newest_valid(tmp_path / "checkpoints") == (None, {})
