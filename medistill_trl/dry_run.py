"""What a run would be: recipe, memory, one example."""

from accelerate import PartialState

from medistill_trl.inputs import Loaded
from medistill_trl.memory.plan import MemoryPlan, Planner
from medistill_trl.memory.tables import to_text
from medistill_trl.methods import Method
from medistill_trl.prompts import encode_example
from medistill_trl.recipe import Recipe
from medistill_trl.setting import Arguments


def memory_plan(method: Method, arguments: Arguments, loaded: Loaded) -> MemoryPlan:
    """What a run holds on one device."""
    configs = loaded.student.config, loaded.teacher.config
    device_type = arguments.training.device.type
    keeps = method.keeps_teacher(arguments)
    planner = Planner(arguments, *configs, method.memory, device_type, keeps_teacher=keeps)
    return planner.plan()


def print_plan(recipe: Recipe, method: Method, arguments: Arguments, loaded: Loaded) -> None:
    """The dry run: resolved recipe, memory plan, one example as the student will see it."""
    if not PartialState().is_main_process:
        return
    prompt = loaded.train_prompts[0]
    form = loaded.student_form
    asked, target = method.example(arguments.training, prompt)
    example = encode_example(form, prompt.question, target, True, None)
    trained = [token for token in example["labels"] if token >= 0]
    rendered = form.tokenizer.decode(example["input_ids"][: -len(trained)])
    plan = memory_plan(method, arguments, loaded)
    print(f"# resolved recipe\n{recipe.to_yaml()}")
    print(f"# memory plan, per device\n{to_text(plan)}\n")
    if loaded.server is not None:
        print(
            f"# teacher: {loaded.server.url} serves it as {loaded.server.model}; none of its weights are loaded here\n"
        )
    print(
        f"# prompts: {len(loaded.train_prompts)} to train on, {len(loaded.validation_prompts)} held out\n"
    )
    print(
        f"# one example ({prompt.id}), what the teacher is asked\n{loaded.teacher_form.render(asked)}\n"
    )
    print(f"# what the student sees, {len(rendered)} characters without loss\n{rendered}\n")
    print(
        f"# what it learns: {method.learns}, {len(trained)} tokens with loss\n"
        f"{form.tokenizer.decode(trained)}\n"
    )
    print("dry run: everything checked, nothing trained")
