"""FitNets trainers on the tiny pair."""

import torch
from tiny_setting import make_form, make_setting
from transformers import LlamaConfig, LlamaForCausalLM

from medistill_trl import methods
from medistill_trl.methods.fitnets.trainer import MODULE

PAIRS = {1: 2, 2: 3}


def make_narrow(width=32, layers=2, seed=2):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(make_form().tokenizer),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.1,
        )
    )


def fitnets(tmp_path, **changes):
    return make_setting(tmp_path, "fitnets", **{"feature_loss": "mse", **changes})


def built(setting):
    return methods.load("fitnets").build(setting)


def own(trainer):
    """The student's weights, without the projections."""
    return {n: p for n, p in trainer.model.named_parameters() if MODULE not in n}
