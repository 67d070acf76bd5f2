"""A teacher's last hidden states on the held-out completions, and its output head: its logits there without its model.

Exact, unlike what is kept of the training tokens (`teacher_logits`): held-out numbers compare runs, so they must not
depend on where the teacher's distributions come from. The head is a small part of a model, and the completions are few.

Shapes: C completion tokens, H the teacher's hidden size, V its vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save

from medistill_trl.errors import UserError
from medistill_trl.files import write_bytes
from medistill_trl.losses.heads import LinearHead, OutputHead
from medistill_trl.model_source import remembered_digest
from medistill_trl.teacher import Teacher
from medistill_trl.turns import turn

FORMAT = 1

Sequences = Sequence[tuple[list[int], list[int]]]  # token ids of prompt and completion


@dataclass(frozen=True)
class HeldoutStates:
    """Of one teacher on some completions.

    Args:
        states: The states that predict each completion, (C, H).
        head: From states to logits.
    """

    states: list[torch.Tensor]
    head: LinearHead

    @classmethod
    def of(
        cls, teacher: Teacher, sequences: Sequences, folder: Path, device: torch.device
    ) -> "HeldoutStates":
        """As kept in a folder, where the teacher's model is asked if they are not there.

        Under autocast they are those of autocast, and kept apart.

        Args:
            device: Where logits are computed.
        """
        autocast = torch.is_autocast_enabled(device.type)
        content = json.dumps([FORMAT, teacher.identity, autocast, sequences])
        key = hashlib.sha256(content.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        state = PartialState()
        with turn(folder / "lock", folder):
            if state.is_main_process and not list(folder.glob(f"{key}-*.safetensors")):
                for torn in folder.glob("*.partial"):  # of a run that was killed
                    torn.unlink()
                content = _read(teacher, sequences)
                digest = hashlib.sha256(content).hexdigest()
                write_bytes(folder / f"{key}-{digest}.safetensors", content)
            state.wait_for_everyone()
        return cls._load(next(folder.glob(f"{key}-*.safetensors")), len(sequences), device)

    @classmethod
    def _load(cls, path: Path, count: int, device: torch.device) -> "HeldoutStates":
        if remembered_digest(path) != path.stem.partition("-")[2]:
            raise UserError(
                f"held-out states {path}: the file is not what was written; remove it, and the teacher reads the "
                "held-out completions anew"
            )
        with safe_open(path, framework="pt") as file:
            scale, softcap = json.loads(file.metadata()["head"])
            bias = file.get_tensor("bias").to(device) if "bias" in file.keys() else None  # noqa: SIM118
            weight = file.get_tensor("weight").to(device)
            states = [file.get_tensor(f"states {index}") for index in range(count)]
        return cls(states, LinearHead(weight, bias, scale=scale, softcap=softcap))

    def logits(self, index: int) -> torch.Tensor:
        """The teacher's, for each token of a completion, (C, V), float32."""
        states_CH = self.states[index].to(self.head.weight.device)
        return self.head.project(states_CH, torch.float32, track=False).logits_CV


@torch.no_grad()
def _read(teacher: Teacher, sequences: Sequences) -> bytes:
    model = teacher.model
    head = OutputHead.of(model)
    if not isinstance(head, LinearHead):
        raise UserError(
            f"teacher_logits: stored keeps the output head of the teacher, and {teacher.identity} has none that is a "
            "plain matrix; set teacher_logits: online"
        )
    head.check(model)
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    for index, (prompt_ids, ids) in enumerate(sequences):
        first = len(prompt_ids) - 1  # the last prompt token predicts the first completion token
        input_ids = torch.tensor([prompt_ids + ids], device=model.device)
        states_TH = model.get_decoder()(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False
        ).last_hidden_state[0]
        tensors[f"states {index}"] = states_TH[first : first + len(ids)]
    metadata = {"head": json.dumps([head.scale, head.softcap])}
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
