"""SPIN's schedule, its pairs and their file."""

import json

import pytest
import torch
from tiny_setting import make_form

from medistill_trl.methods.spin.rounds import (
    RoundFile,
    complete_round,
    describe,
    fingerprint,
    make_pair,
)
from medistill_trl.methods.spin.schedule import Schedule
from medistill_trl.teacher import Completion


def make_schedule(**changes):
    values = {
        "num_prompts": 5,
        "num_iterations": 3,
        "epochs_per_iteration": 2,
        "keep_rounds": 2,
        "pairs_per_step": 4,
        "seed": 1,
    }
    return Schedule(**{**values, **changes})


# --- schedule --------------------------------------------------------------------------------------


def test_each_iteration_passes_over_the_pairs_of_its_rounds():
    schedule = make_schedule()
    # 2 passes over 5 pairs fill 3 steps of 4 with 2 repeated; over 10 pairs they fill 5 exactly.
    assert schedule.spans == [range(0, 3), range(3, 8), range(8, 13)]
    assert [schedule.repeated(k) for k in range(3)] == [2, 0, 0]
    rows = schedule.rows()
    pairs = list(zip(rows["round"], rows["prompt"], strict=True))
    assert len(pairs) == 13 * 4
    assert sorted(pairs[:5]) == sorted(pairs[5:10]) == [(0, n) for n in range(5)]
    assert pairs[:5] != pairs[5:10]
    assert pairs[10:12] == pairs[:2]
    for start, rounds in ((12, (0, 1)), (32, (1, 2))):
        everything = [(k, n) for k in rounds for n in range(5)]
        assert sorted(pairs[start : start + 10]) == everything
        assert sorted(pairs[start + 10 : start + 20]) == everything


def test_the_order_follows_the_seed_alone():
    assert make_schedule().rows() == make_schedule().rows()
    assert make_schedule().rows() != make_schedule(seed=2).rows()


def test_max_steps_ends_the_schedule_where_it_stands():
    whole, cut = make_schedule(), make_schedule(max_steps=5)
    assert cut.spans == [range(0, 3), range(3, 5)]
    assert cut.rows()["prompt"] == whole.rows()["prompt"][:20]
    assert make_schedule(max_steps=99).num_steps == whole.num_steps == 13
    assert make_schedule(max_steps=3).spans == [range(0, 3)]


def test_the_iteration_of_each_step():
    schedule = make_schedule()
    assert [schedule.iteration_at(step) for step in (0, 2, 3, 7, 8, 12)] == [0, 0, 1, 1, 2, 2]
    assert schedule.iteration_at(13) == 2  # where the learning rate stands after the last step


def test_fewer_pairs_than_a_step_holds():
    schedule = make_schedule(num_prompts=1, epochs_per_iteration=1, keep_rounds=1, pairs_per_step=3)
    assert schedule.rows() == {"round": [0] * 3 + [1] * 3 + [2] * 3, "prompt": [0] * 9}


# --- pairs -----------------------------------------------------------------------------------------

FORM = make_form()
END = FORM.tokenizer.eos_token_id


def answer(text, finished=True, end_id=END):
    ids = FORM.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Completion(text, ids, finished, end_id if finished else None)


def make(chosen, rejected, max_length=None):
    return make_pair(FORM, FORM.render("Why does gout hurt?"), chosen, rejected, max_length)


def test_a_pair_holds_the_students_prompt_and_both_answers_with_their_end():
    pair = make(answer("Urate crystals."), answer("It does not."))
    assert pair.prompt_ids == FORM.encode(FORM.render("Why does gout hurt?"))
    assert pair.chosen_ids == [*answer("Urate crystals.").token_ids, END]
    assert pair.rejected_ids == [*answer("It does not.").token_ids, END]
    assert pair.notes == ()
    assert pair.counts


def test_the_students_own_tokens_are_kept_as_it_chose_them():
    odd = Completion("ab", [5, 6, 7], finished=True, end_id=0)  # not how the tokenizer splits "ab"
    assert make(answer("c"), odd).rejected_ids == [5, 6, 7, 0]
    at_stop_string = Completion("ab", [5, 6, 7], finished=True, end_id=None)
    assert make(answer("c"), at_stop_string).rejected_ids == [5, 6, 7, END]


@pytest.mark.parametrize(
    ("chosen", "rejected", "notes", "counts"),
    [
        (answer("Same."), answer("Same."), ("equal",), False),
        (answer("Same.", False), answer("Same."), ("equal", "truncated_chosen"), False),
        (answer(""), answer("Some."), ("empty_chosen",), False),
        (answer(""), answer(""), ("equal", "empty_chosen", "empty_rejected"), False),
        (answer("Some."), answer(""), ("empty_rejected",), True),
        (answer("Some.", False), answer("Other."), ("truncated_chosen",), True),
        (answer("Some."), answer("Other.", False), ("truncated_rejected",), True),
    ],
)
def test_what_is_odd_about_a_pair_is_noted(chosen, rejected, notes, counts):
    pair = make(chosen, rejected)
    assert pair.notes == notes
    assert pair.counts == counts
    assert (pair.chosen_ids[-1:] == [END]) == chosen.finished
    assert (pair.rejected_ids[-1:] == [END]) == rejected.finished
    summary = describe([pair, make(answer("a"), answer("b"))])
    assert summary["pairs"] == 2
    assert summary["pairs_with_loss"] == 1 + counts
    assert all(summary[name] == (name in notes) for name in notes)


def test_what_exceeds_the_length_limit_is_cut_and_noted():
    chosen, rejected = answer("Urate crystals in the joint."), answer("No.")
    prompt = len(make(chosen, rejected).prompt_ids)
    pair = make(chosen, rejected, max_length=prompt + len(rejected.token_ids) + 1)
    assert pair.chosen_ids == chosen.token_ids[: len(rejected.token_ids) + 1]
    assert pair.rejected_ids == [*rejected.token_ids, END]
    assert pair.notes == ("truncated_chosen",)


# --- the file --------------------------------------------------------------------------------------


def record(number):
    return {"prompt": number, "rejected": f"line\u2028{number}"}


def test_a_torn_line_is_not_read(tmp_path):
    file = RoundFile(tmp_path / "rounds/round-0.jsonl", {"round": 0})
    assert file.read() == []
    file.start([record(0)])
    file.append([record(1), record(2)])
    assert file.read() == [record(0), record(1), record(2)]
    file.path.write_bytes(file.path.read_bytes()[:-9])
    assert file.read() == [record(0), record(1)]
    file.path.write_bytes(b'{"rou')
    assert file.read() == []


def test_a_file_of_another_round_or_other_weights_is_not_read(tmp_path):
    path = tmp_path / "round-0.jsonl"
    RoundFile(path, {"round": 0, "seed": 1, "weights": "a"}).start([record(0)])
    assert RoundFile(path, {"round": 0, "seed": 1, "weights": "a"}).read() == [record(0)]
    assert RoundFile(path, {"round": 0, "seed": 1}).read() == [record(0)]  # weights not known
    for other in ({"weights": "b"}, {"seed": 2}, {"round": 1}, {"step": 0}):
        assert RoundFile(path, {"round": 0, "seed": 1, "weights": "a", **other}).read() == []


def test_a_round_goes_on_at_the_batch_that_is_missing(tmp_path):
    file = RoundFile(tmp_path / "round-0.jsonl", {"round": 0})
    asked = []

    def answers(index, stop_at=None):
        if index == stop_at:
            raise KeyboardInterrupt
        asked.append(index)
        return [record(10 * index + n) for n in range([2, 2, 1][index])]

    with pytest.raises(KeyboardInterrupt):
        complete_round(file, [2, 2, 1], lambda index: answers(index, stop_at=2))
    # As if the kill had come while the second batch was being written.
    file.path.write_bytes(file.path.read_bytes()[:-3])
    everything = complete_round(file, [2, 2, 1], answers)
    assert asked == [0, 1, 1, 2]
    assert [r["prompt"] for r in everything] == [0, 1, 10, 11, 20]
    assert file.read() == everything
    assert complete_round(file, [2, 2, 1], answers) == everything
    assert asked == [0, 1, 1, 2]
    assert json.loads(file.path.read_text().split("\n")[0]) == {"round": 0}


def test_a_fingerprint_tells_bits_apart():
    weights = torch.tensor([1.0, 2.0])
    nearly = torch.tensor([1.0, torch.nextafter(torch.tensor(2.0), torch.tensor(3.0))])
    assert fingerprint([weights]) == fingerprint([weights.clone()])
    assert fingerprint([weights]) != fingerprint([nearly])
    assert fingerprint([weights.bfloat16()]) != fingerprint([weights])
