"""Which layer learns from which, and that the states of layer n are those of layer n."""

import re

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from medistill_trl.errors import UserError
from medistill_trl.layers import captured, decoder_layers, layer_pairs, run_through

IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def make_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4))


def make_neox():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, num_hidden_layers=3, **sizes))


# --- the mapping


@pytest.mark.parametrize(
    ("mapping", "num_pairs", "student", "teacher", "expected"),
    [
        ("uniform", 2, 12, 24, [(6, 12), (12, 24)]),
        ("uniform", 2, 22, 32, [(11, 16), (22, 32)]),
        ("uniform", 4, 22, 32, [(5, 8), (11, 16), (16, 24), (22, 32)]),
        ("uniform", 4, 4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),  # TinyBERT
        ("uniform", 1, 2, 4, [(2, 4)]),
        ("last", 2, 22, 32, [(21, 31), (22, 32)]),
        ("last", 1, 6, 12, [(6, 12)]),  # MiniLM
        ("last", 2, 4, 2, [(3, 1), (4, 2)]),
        ("skip", 5, 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]),  # PKD-skip
        ("skip", 2, 6, 12, [(4, 8), (5, 10)]),
        ("skip", 2, 22, 32, [(20, 29), (21, 30)]),
        ({6: 12, 12: 24}, 7, 12, 24, [(6, 12), (12, 24)]),
        ({"12": 24, "6": 12}, 7, 12, 24, [(6, 12), (12, 24)]),
        ({1: 1}, 1, 1, 1, [(1, 1)]),
    ],
)
def test_the_pairs_of_a_mapping(mapping, num_pairs, student, teacher, expected):
    assert layer_pairs(mapping, num_pairs, student, teacher) == expected


@pytest.mark.parametrize(
    ("mapping", "num_pairs", "message"),
    [
        ({7: 4}, 1, "there is no student layer 7; the student's layers are 1 to 6"),
        ({6: 13}, 1, "there is no teacher layer 13; the teacher's layers are 1 to 12"),
        ({0: 4}, 1, "there is no student layer 0; .* the embeddings are not a layer"),
        ({-1: 4}, 1, "there is no student layer -1"),
        ({"six": 4}, 1, "there is no student layer 'six'"),
        ({2: "x"}, 1, "there is no teacher layer 'x'"),
        ({2: 1.5}, 1, "there is no teacher layer 1.5"),
        ({True: 4}, 1, "there is no student layer True"),
        ({6: 4, "6": 5}, 1, "names a student layer twice"),
        ({}, 1, "names no layers"),
        ("middle", 1, "'middle' is not a strategy; one of uniform, last, skip"),
        ("uniform", 7, "must lie between 1 and 6 .* got 7"),
        ("uniform", 0, "must lie between 1 and 6 .* got 0"),
        ("skip", 6, "must lie between 1 and 5 .* got 6"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused_with_the_valid_range(mapping, num_pairs, message):
    with pytest.raises(UserError, match=message):
        layer_pairs(mapping, num_pairs, 6, 12)


# --- the states


@pytest.mark.parametrize("make", [lambda: make_model(50), make_gpt2, make_neox])
def test_captured_states_are_those_of_the_model_layer_by_layer(make):
    model = make().eval()
    with captured(model, [1, 3]) as states, torch.no_grad():
        output = model(IDS, attention_mask=MASK, output_hidden_states=True)
    assert sorted(states) == [1, 3]
    assert torch.equal(states[1], output.hidden_states[1])  # 0 are the embeddings
    assert not torch.equal(states[1], output.hidden_states[2])
    if len(decoder_layers(model)) > 3:
        assert torch.equal(states[3], output.hidden_states[3])


def test_the_last_layer_is_taken_before_the_final_norm():
    model = make_model(50).eval()
    with captured(model, [4]) as states, torch.no_grad():
        last = model(IDS, output_hidden_states=True).hidden_states[-1]
    assert not torch.allclose(states[4], last)
    assert torch.equal(model.model.norm(states[4]), last)


def test_no_hook_stays_behind_even_after_an_error():
    model = make_model(50)
    with pytest.raises(RuntimeError, match="within"), captured(model, [1]) as states:
        raise RuntimeError("within")
    model(IDS)
    assert states == {}


def gradients(model, checkpointing):
    model.train()
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with captured(model, [2]) as states:
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
        first = states[2]
        states[2].square().sum().backward()
    assert states[2] is first  # recomputation is not seen
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_the_same_with_checkpointing(lora):
    model = make_model(50)
    if lora:
        model = get_peft_model(model, LoraConfig("CAUSAL_LM", target_modules="all-linear"))
        model.enable_input_require_grads()  # as SFTTrainer does
    plain, checkpointed = gradients(model, False), gradients(model, True)
    assert len(plain) > 4
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)


# --- a forward that ends early


@pytest.mark.parametrize("make", [lambda: make_model(50), make_gpt2, make_neox])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_the_prefix_gives_exactly_what_the_whole_forward_gives(make, last):
    model = make().eval()
    with captured(model, [1, last]) as whole, torch.no_grad():
        model(IDS, attention_mask=MASK)
    with captured(model, [1, last]) as prefix, torch.no_grad():
        run_through(model, last, IDS, MASK)
    for layer in {1, last}:
        assert torch.equal(prefix[layer], whole[layer])


def test_the_prefix_touches_nothing_behind_its_last_layer():
    model = make_model(50).eval()
    seen = []
    watched = {"block 3": model.model.layers[2], "block 4": model.model.layers[3]}
    watched |= {"norm": model.model.norm, "head": model.lm_head, "block 2": model.model.layers[1]}
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        run_through(model, 2, IDS, MASK)
        assert seen == ["block 2"]
        model(IDS)  # the model is as it was
    assert seen[1:] == ["block 2", "block 3", "block 4", "norm", "head"]


def test_left_padded_rows_give_the_states_of_right_padded_ones():
    """Positions and masks of the prefix are the model's own."""
    model = make_model(50).eval()
    with captured(model, [2]) as states, torch.no_grad():
        run_through(model, 2, IDS[1:], MASK[1:])
        right = states[2][0, :3]
        run_through(model, 2, IDS[1:].roll(2, 1), MASK[1:].roll(2, 1))
        left = states[2][0, 2:]
    # Rotary positions are relative, so a shift of all of them changes nothing.
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_an_architecture_without_a_list_of_blocks_is_refused():
    model = make_model(50)
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match=re.escape("its decoder has 0 lists of 4 blocks")):
        decoder_layers(model)
