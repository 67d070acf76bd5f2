"""Study files of tests."""

import yaml

from medistill_trl.study import definition, grid

PLAIN = {
    "name": "plain",
    "shared": {"max_train_samples": 16},
    "grid": [{"method": ["sft", "logit_kd"]}, {"lora_r": [4, 8], "lora_alpha": [8, 16]}],
    "seeds": [1, 2],
    "methods": {"logit_kd": {"alpha": 0.25}, "spin": {"num_iterations": 9}},
    "budget": {"optimizer_steps": 4},
}


def write(folder, content):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def expand(folder, content=PLAIN, changes=(), overlays=()):
    study = definition.read(write(folder, content), list(overlays), list(changes))
    return grid.expand(study, folder / "out")
