"""Pushing a run, against a hub on this machine, and the card that goes with it."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from crafted_run import RECIPE, evaluation, write_run
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants
from safetensors.numpy import save_file

from medistill_trl.errors import RunFailed, UserError
from medistill_trl.hub import card, files
from medistill_trl.hub import push as pushing
from medistill_trl.sealed_json import write_record

# huggingface_hub's own upload, not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/tiny-sft"
MODEL_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(pushing, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub().running() as hub:
        yield hub


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)


def push(hub, run, repo_id=REPO, allow_partial=False, **target):
    selection = pushing.plan(run, allow_partial)
    return pushing.push(run, selection, pushing.Target(repo_id, **target), hub.endpoint)


# --- what goes there


def test_a_push_is_one_private_commit_of_the_model_and_nothing_else(hub, run):
    (run.final_model / "training_args.bin").write_bytes(pickle.dumps("x"))
    pushed = push(hub, run)
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.messages == ["initial commit", "Push sft_x"]
    assert repository.files().keys() - {".gitattributes"} == MODEL_FILES
    for name in MODEL_FILES - {"README.md"}:
        assert repository.files()[name] == (run.final_model / name).read_bytes(), name
    assert pushed.url == f"{hub.endpoint}/{REPO}/tree/{repository.resolve('main')}"
    assert pushed.changed
    assert pushed.others == []


def test_the_plan_names_what_is_left_out_and_asks_the_hub_nothing(hub, run):
    for name in ("training_args.bin", "notes.docx"):
        (run.final_model / name).write_bytes(b"x")
    (run.final_model / "merges.txt").symlink_to(run.recipe)
    selection = pushing.plan(run)
    assert {file.name for file in selection.files} == MODEL_FILES
    assert {item.name for item in selection.left_out} == {
        "COMPLETE", "checkpoints/", "inputs.json", "recipe.yaml", "results/",
        "final_model/training_args.bin", "final_model/notes.docx", "final_model/merges.txt",
    }  # fmt: skip
    assert next(i.size for i in selection.left_out if i.name == "checkpoints/") == 6
    assert hub.asked == []


def test_a_branch_is_made_and_main_stays(hub, run):
    push(hub, run, revision="v2")
    assert hub.repositories[REPO].files("main").keys() == {".gitattributes"}
    assert hub.repositories[REPO].files("v2").keys() >= MODEL_FILES


def test_what_was_there_before_stays_and_is_named(hub, run):
    hub.add(REPO, private=True, files={"old.safetensors": b"old"})
    assert push(hub, run).others == ["old.safetensors"]
    assert "old.safetensors" in hub.repositories[REPO].files()


def test_the_same_files_are_not_committed_twice(hub, run):
    first = push(hub, run)
    again = push(hub, run)
    assert not again.changed
    assert again.commit == first.commit
    assert len(hub.repositories[REPO].messages) == 2


def test_a_run_may_be_named_by_a_dot(hub, run, monkeypatch):
    monkeypatch.chdir(run.path)
    push(hub, card.RunDirectory(Path()))
    repository = hub.repositories[REPO]
    assert repository.messages[-1] == "Push sft_x"
    assert b"\n# sft_x\n" in repository.files()["README.md"]


# --- who sees it


def test_public_only_when_asked(hub, run):
    push(hub, run, public=True)
    assert not hub.repositories[REPO].private


def test_a_public_repository_is_not_pushed_to_unasked(hub, run):
    hub.add(REPO, private=False)
    with pytest.raises(UserError, match="everybody can see it; give --public"):
        push(hub, run)
    assert "commit" not in hub.asked
    assert hub.large == {}


def test_a_private_repository_stays_private(hub, run, caplog):
    hub.add(REPO, private=True)
    push(hub, run, public=True)
    assert hub.repositories[REPO].private
    assert "is private and stays so" in caplog.text


# --- what fails


@pytest.mark.parametrize("step", ["create", "info", "commit"])
def test_an_error_that_passes_is_tried_again(hub, run, step):
    hub.fail(step, 500, times=2)
    push(hub, run)
    assert hub.repositories[REPO].messages == ["initial commit", "Push sft_x"]


def test_a_gateway_that_answers_with_a_page_is_tried_again(hub, run):
    hub.fail("validate", 502, times=2, body=b"<html>Bad gateway</html>")
    push(hub, run)
    assert hub.asked.count("validate") == 3


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, run):
    hub.fail("commit", 500, afterwards=True)
    pushed = push(hub, run)
    assert hub.asked.count("commit") == 1
    assert pushed.changed
    assert pushed.commit == hub.repositories[REPO].resolve("main")


def test_an_error_that_stays_ends_it_loudly(hub, run, caplog):
    hub.fail("create", 503, times=99)
    with pytest.raises(RunFailed, match=r"making me/tiny-sft: the hub answers with status 503\."):
        push(hub, run)
    assert hub.asked == ["create"] * 4
    assert "trying again in 0.01 s" in caplog.text


def test_a_hub_that_cannot_be_reached_is_tried_again_and_named(hub, run, caplog):
    selection = pushing.plan(run)
    with pytest.raises(RunFailed, match="the hub cannot be reached"):
        pushing.push(run, selection, pushing.Target(REPO), "http://127.0.0.1:9")
    assert caplog.text.count("trying again") == 3


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "hf auth login"),
        (402, "asks for payment"),
        (403, "a token that may write there, or another --repo_id"),
        (404, "check --repo_id"),
        (422, "it refuses this. It says: out of order"),
        (429, "wait and push again"),
    ],
)
def test_an_error_with_a_reason_is_not_tried_again(hub, run, status, advice):
    hub.fail("info", status, times=99)
    with pytest.raises(UserError, match=advice) as caught:
        push(hub, run)
    assert f"status {status}" in str(caught.value)
    assert caught.value.exit_code == 2
    assert hub.asked.count("info") == 1
    assert "commit" not in hub.asked


def test_another_token_is_refused_with_what_to_do(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Wrong" * 6)
    with pytest.raises(UserError, match=r"status 401: .*log in with `hf auth login`") as caught:
        push(hub, run)
    assert "Wrong" not in str(caught.value)


def test_another_owner_is_refused(hub, run):
    with pytest.raises(UserError, match=r"status 403: .*you may not create a model under them"):
        push(hub, run, "them/x")


def test_without_login_or_with_the_hub_switched_off_nothing_is_asked(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run.path / "no-token"))
    with pytest.raises(UserError, match="nobody is logged in; log in with `hf auth login`"):
        push(hub, run)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(hub, run)
    assert hub.asked == []


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, run, monkeypatch):
    send = pushing._send

    def send_and_be_overtaken(api, additions, target):
        send(api, additions, target)
        hub.repositories[REPO].commit("main", {"README.md": b"theirs"}, "theirs")

    monkeypatch.setattr(pushing, "_send", send_and_be_overtaken)
    with pytest.raises(UserError, match="somebody else has committed"):
        push(hub, run)
    assert hub.repositories[REPO].files()["README.md"] == b"theirs"


def test_what_stands_there_afterwards_is_looked_at(hub, run):
    hub.ignored = {"tokenizer.json"}
    hub.spoilt = {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(RunFailed) as caught:
        push(hub, run)
    for said in (
        "adapter_config.json has another content",
        "adapter_model.safetensors has another content",
        "tokenizer.json is missing",
        ".gitignore",
    ):
        assert said in str(caught.value)


def test_a_card_the_hub_refuses_is_the_users_to_mend(hub, run):
    path = run.final_model / "README.md"
    path.write_text(path.read_text().replace("license: other", "license: nonsense"))
    with pytest.raises(UserError, match=r"refuses the card's metadata"):
        push(hub, run)
    assert "commit" not in hub.asked


@pytest.mark.parametrize("repo_id", ["alone", "a/b/c", "me/a..b", "me/", "me/x y"])
def test_a_name_that_cannot_be_is_refused_here(repo_id):
    with pytest.raises(UserError, match="--repo_id"):
        pushing.Target(repo_id)


# --- what is refused before anything is sent

OWN = "an-unusual-token-of-another-hub"
PLACES = {
    "a hub token in the chat template": lambda model, _: (model / "chat_template.jinja").write_text(
        "{{ x }}\n{# hf_" + "a1" * 12 + " #}"
    ),
    "a key in the tokenizer's settings": lambda model, _: (
        model / "tokenizer_config.json"
    ).write_text('{"key": "sk-' + "b2" * 12 + '"}'),
    "a password in the card": lambda model, _: (model / "README.md").write_text(
        "see https://ann:" + "c3c3@example.org"
    ),
    "the own token, whatever it looks like": lambda model, own: (model / "vocab.txt").write_text(
        f"a\nb\n{own}"
    ),
    "in the header of the weights": lambda model, _: save_file(
        {"a": np.zeros(2)}, model / "adapter_model.safetensors", {"note": "ghp_" + "d4" * 12}
    ),
    "the own token among the numbers": lambda model, own: save_file(
        {"a": np.frombuffer(own.encode(), np.uint8)}, model / "adapter_model.safetensors"
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_stops_everything_and_is_not_repeated(hub, run, monkeypatch, place):
    monkeypatch.setenv("HF_TOKEN", OWN)
    PLACES[place](run.final_model, OWN)
    with pytest.raises(UserError, match=r"nothing is pushed, .*looks like a token") as caught:
        push(hub, run)
    for secret in (OWN, "a1a1", "b2b2", "c3c3", "d4d4"):
        assert secret not in str(caught.value)
    assert hub.asked == []


def test_the_place_of_a_secret_is_named(run):
    (run.final_model / "chat_template.jinja").write_text("\n\nhf_" + "a1" * 12)
    with pytest.raises(UserError, match=r"chat_template\.jinja: .*line 3 holds"):
        files.select(run, False, None)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_model.pt", "value_head.pth", "m.pkl"]
)
def test_a_weight_that_can_run_code_is_refused(run, name):
    (run.final_model / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{name}: not pushed, since opening such a file can run"):
        files.select(run, False, None)


def test_a_pickle_under_a_safe_name_is_refused(run):
    (run.final_model / "adapter_model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="not a safetensors file"):
        files.select(run, False, None)


def test_no_model_no_push(run, tmp_path):
    with pytest.raises(UserError, match="no run is here"):
        files.select(card.RunDirectory(tmp_path / "nowhere"), False, None)
    (run.final_model / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        files.select(run, False, None)
    (run.final_model / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="no model is here"):
        files.select(run, False, None)


def test_an_unfinished_run_is_pushed_only_on_request_and_says_so(hub, run):
    run.complete.unlink()
    (run.results / "run.json").unlink()
    (run.final_model / "README.md").unlink()
    with pytest.raises(UserError, match=r"not finished \(no COMPLETE\)"):
        push(hub, run)
    assert hub.asked == []
    push(hub, run, allow_partial=True)
    assert b"The run was not finished" in hub.repositories[REPO].files()["README.md"]


# --- the card that goes with it


def test_the_pushed_card_has_the_evaluation_of_this_run_alone(hub, run):
    write_record(run.evaluation, evaluation({**RECIPE, "lora_r": 8}))
    selection = pushing.plan(run)
    assert any("the card has no scores" in note for note in selection.notes)
    write_record(run.evaluation, evaluation())
    push(hub, run)
    assert b"model-index" in hub.repositories[REPO].files()["README.md"]


def test_a_card_edited_by_hand_is_kept(hub, run):
    path = run.final_model / "README.md"
    path.write_text(path.read_text() + "\nWritten by hand.\n")
    write_record(run.evaluation, evaluation())
    assert any("is pushed as it is" in note for note in pushing.plan(run).notes)
    push(hub, run)
    assert hub.repositories[REPO].files()["README.md"] == path.read_bytes()
    path.write_bytes(b"# A card\xe8 that was damaged")
    with pytest.raises(UserError, match="not UTF-8 text"):
        pushing.plan(run)


def test_the_restriction_is_told_before_a_push(run):
    assert any("the teacher's licence bears on this" in note for note in pushing.plan(run).notes)
