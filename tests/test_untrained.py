"""What a student answers before training is written once for all runs."""

import pytest
import torch
from tiny_setting import make_setting

from medistill_trl.model_source import ModelSource
from medistill_trl.untrained import untrained_answers


def source_of(setting, fingerprint="student-1"):
    return ModelSource("s", "s", None, setting.student.config, fingerprint)


def forwards(setting):
    """A list that grows with each forward of the student."""
    seen = []
    decoder = setting.student.get_decoder()
    decoder.register_forward_hook(lambda *_: seen.append(1))
    return seen


def expected(setting):
    return setting.heldout.examples(
        setting.student, setting.arguments.teacher.teacher_max_new_tokens
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_answers_are_those_of_the_student_as_it_comes(tmp_path, lora, autocast):
    setting = make_setting(tmp_path, "sft", lora=lora)
    setting.heldout.autocast = autocast
    wanted = expected(setting)
    assert all(wanted)
    assert untrained_answers(setting, source_of(setting)) == wanted
    trainable = [p for p in setting.student.parameters() if p.requires_grad]
    assert trainable
    assert (
        all("lora" in n for n, p in setting.student.named_parameters() if p.requires_grad) == lora
    )


def test_a_run_of_any_method_does_not_write_them_again(tmp_path):
    first = make_setting(tmp_path, "sft", lora=True)
    seen = forwards(first)
    wanted = untrained_answers(first, source_of(first))
    assert len(seen) == first.arguments.teacher.teacher_max_new_tokens
    again = make_setting(tmp_path, "on_policy", lora=True)
    seen = forwards(again)
    assert untrained_answers(again, source_of(again)) == wanted
    assert not seen


def test_an_adapter_does_not_change_them(tmp_path):
    setting = make_setting(tmp_path, "sft", lora=True)
    wanted = expected(setting)
    with torch.no_grad():
        for name, weight in setting.student.named_parameters():
            if "lora_B" in name:
                weight.fill_(1.0)
    assert expected(setting) != wanted
    assert untrained_answers(setting, source_of(setting)) == wanted


def test_another_student_or_another_way_of_writing_is_asked_itself(tmp_path):
    setting = make_setting(tmp_path, "sft")
    untrained_answers(setting, source_of(setting))
    seen = forwards(setting)
    untrained_answers(setting, source_of(setting, "student-2"))
    assert seen
    seen.clear()
    setting.heldout.autocast = True
    untrained_answers(setting, source_of(setting))
    assert seen
    seen.clear()
    setting.arguments.student.student_load_in_8bit = True
    untrained_answers(setting, source_of(setting))
    assert seen
