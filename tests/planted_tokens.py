"""Tokens in all the places where a run could pick them up, and a search for them in what it wrote."""

import os
from pathlib import Path

HUB, TRACKER, GIT, CLOUD, TEACHER = (
    "hf_" + "Pl4nted" * 5,
    "Tr4cker" * 6,
    "ghp_" + "G1tRemote" * 4,
    "Cl0ud" * 8,
    "T3acher" * 6,
)
TOKENS = (HUB, TRACKER, GIT, CLOUD, TEACHER)


def environment() -> dict[str, str]:
    """As of a user who is logged in everywhere, in a clone whose remote has a token in its address."""
    return os.environ | {
        "HF_TOKEN": HUB,
        "HUGGING_FACE_HUB_TOKEN": HUB,
        "WANDB_API_KEY": TRACKER,
        "AWS_SECRET_ACCESS_KEY": CLOUD,
        "MEDISTILL_TEACHER_API_KEY": TEACHER,
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "remote.origin.url",
        "GIT_CONFIG_VALUE_0": f"https://ann:{GIT}@git.invalid/medistill_trl.git",
    }


def holders(*places: Path | str) -> list[str]:
    """Files below the folders, and texts, in which one of the tokens stands; what was looked at must not be empty."""
    contents = {}
    for place in places:
        if isinstance(place, str):
            contents[f"a text: {place[:40]!r}"] = place.encode()
            continue
        files = [path for path in sorted(place.rglob("*")) if path.is_file()]
        assert files, f"nothing was written to {place}"
        contents |= {str(path): path.read_bytes() for path in files}
    return [
        name for name, content in contents.items() if any(t.encode() in content for t in TOKENS)
    ]
