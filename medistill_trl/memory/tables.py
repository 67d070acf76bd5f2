"""The plan as text."""

from medistill_trl.memory.plan import (
    CONTEXT_GB,
    FRAGMENTATION,
    GENERATE,
    SCORE,
    MemoryPlan,
    Planner,
    usable,
)

ADVICE = {
    GENERATE: "lower teacher_batch_size or teacher_max_new_tokens",
    SCORE: "lower per_device_eval_batch_size or per_device_train_batch_size",
}


def to_text(plan: MemoryPlan) -> str:
    """A table: parts below each other, phases side by side."""
    names = list(dict.fromkeys(name for phase in plan.phases for name in phase.parts))
    width = max(map(len, names))
    lines = ["  GB (10⁹ bytes)".ljust(width + 2) + "".join(f"{p.name:>10}" for p in plan.phases)]
    for name in names:
        cells = (f"{p.parts[name]:10.2f}" if name in p.parts else " " * 10 for p in plan.phases)
        lines.append(f"  {name:<{width}}{''.join(cells)}".rstrip())
    lines.append(f"  {'together':<{width}}" + "".join(f"{phase.gb:10.2f}" for phase in plan.phases))
    lines.append(f"  peak {plan.peak.gb:.2f} GB, in phase {plan.peak.name}")
    lines.append(
        "  An estimate: on a GPU add about 1 GB and 10 % for context and fragmentation, on CPU about 1 GB "
        "for Python and libraries."
    )
    return "\n".join(lines)


def micro_batches(planner: Planner, vram_gb: float | None) -> str:
    """Micro-batches side by side: what they take with and without gradient checkpointing, and the largest that fits.

    Args:
        vram_gb: Of the device; None leaves the last out.
    """
    own = planner.arguments.training.per_device_train_batch_size
    sizes = sorted({1, own, 2 * own})
    lines = ["", "training, GB by micro-batch".ljust(34) + "".join(f"{size:>9}" for size in sizes)]
    for checkpointing in (True, False):
        name = f"  {'with' if checkpointing else 'without'} gradient checkpointing"
        cells = "".join(f"{planner.train(size, checkpointing).gb:9.2f}" for size in sizes)
        lines.append(f"{name:<34}{cells}")
    if vram_gb is None:
        return "\n".join(lines)
    room = usable(vram_gb)
    lines.append(
        f"on {vram_gb:g} GB, {room:.1f} of them for the plan ({CONTEXT_GB:g} GB are the context's, and "
        f"{FRAGMENTATION:.0%} of the rest may be fragments), the largest micro-batch that trains is"
    )
    for checkpointing in (True, False):
        most = planner.largest_micro_batch(room, checkpointing)
        name = "with" if checkpointing else "without"
        lines.append(f"  {most or 'none'} {name} gradient checkpointing")
    for phase in planner.plan().phases[:2]:
        if phase.gb > room:
            lines.append(f"  but to {phase.name} takes {phase.gb:.2f} GB: {ADVICE[phase.name]}")
    return "\n".join(lines)
