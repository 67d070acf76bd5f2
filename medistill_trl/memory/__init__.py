"""Peak memory of a recipe before it is launched: from the two configs, without weights and without a GPU.

- `meter`: counts the bytes of tensors that have a size and no content
- `quantised`: 4- and 8-bit layers for such tensors
- `weightless`: the two models, as a run would load them, without their weights
- `step`: one micro-batch on them
- `losses`: what methods do with it, by the functions they train with
- `plan`: phases, parts, and the largest micro-batch that fits
- `tables`: the plan as text
"""
