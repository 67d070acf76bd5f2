"""How large a model is: parameters and the bytes they take, quantised ones too."""

import torch
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from transformers import PreTrainedModel

from eval.item_store import ItemStore
from eval.subjects import Subject


def footprint(subject: Subject, store: ItemStore) -> dict:
    """`parameters` and `weights_gb` (10⁹ bytes) of a subject, adapter included; loaded if not yet known."""
    key = {"measure": "footprint, version 1", "subject": subject.fingerprint}

    def compute(items: list[dict]) -> list[dict]:
        parameters = num_parameters(subject.model)
        return [{"parameters": parameters, "weights_gb": weights_bytes(subject.model) / 1e9}]

    (record,) = store.records(key, [{"id": "weights"}], compute, 1, f"size of the {subject.name}")
    return {"parameters": record["parameters"], "weights_gb": record["weights_gb"]}


def num_parameters(model: PreTrainedModel) -> int:
    """Weights, however many bits each takes; shared ones once."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.num_parameters()  # an adapter's layers stand in the base model


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, and of the scales that 4-bit weights come with."""
    return sum(
        _size(tensor) + (_scales(tensor) if isinstance(tensor, Params4bit) else 0)
        for tensor in (*model.parameters(), *model.buffers())
    )


def _scales(weight: Params4bit) -> int:
    parts = weight.quant_state.as_dict().values()
    return sum(_size(part) for part in parts if isinstance(part, torch.Tensor))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
