"""The `medistill` command: one name for everything the project does.

    medistill prepare     python -m data_prep.build
    medistill train       accelerate launch recipes/run.py
    medistill plan        python -m medistill_trl.memory
    medistill evaluate    python -m eval.run
    medistill compare     python -m eval.compare
    medistill study       python -m medistill_trl.study
    medistill push        a finished run to the model hub

All but `push` become the command they stand for: this process is replaced by it (exec). So its exit status is the
command's, Ctrl-C and every other signal reach it directly, and the library never imports `eval` or `data_prep`. The
words are handed on as they are; what they mean is said in one place, the command itself.
"""

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer

from medistill_trl import __version__
from medistill_trl.errors import UserError

if TYPE_CHECKING:
    from medistill_trl.hub.files import Selection

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = "accelerate_configs"
HELP = {"-h", "--help"}
# Words that are not ours belong to the command; --help too, where the command has more to say.
HANDED_ON = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
    "add_help_option": False,
}
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="WORDS", help="Handed on as they are.", show_default=False),
]

app = typer.Typer(
    name="medistill",
    help="Distil a large medical language model into a small one, ten ways. For research, not for care.",
    epilog="medistill COMMAND --help says more of each. Commands run from the repository's root.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The command; a user's error is told without a traceback."""
    try:
        app(prog_name="medistill")
    except UserError as error:
        print(f"\nmedistill_trl: {error}\n", file=sys.stderr)
        sys.exit(error.exit_code)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"medistill_trl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    pass


# --- commands that become others ---------------------------------------------------------------------


@app.command(**HANDED_ON)
def prepare(context: typer.Context, words: Words = None) -> None:
    """Make all the data: training pool, benchmarks, perplexity and faithfulness sets.

    - `medistill prepare --out data` from the hub
    - `medistill prepare --out data --sample` from the packaged sample, without downloads
    """
    _become_module(context, "data_prep.build", words)


ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config_file",
        help="How accelerate launches it: a file, or one of accelerate_configs by name, such as cpu or "
        "rtx5090_qlora.",
        autocompletion=lambda: [path.stem for path in _configs()],
        show_default=False,
    ),
]
Recipe = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE [OVERLAY ...] [--KEY VALUE ...]",
        help="YAML files, of which later ones win, and keys, which win over files.",
        show_default=False,
    ),
]


@app.command(**HANDED_ON)
def train(context: typer.Context, words: Recipe = None, config_file: ConfigFile = None) -> None:
    """Train what a recipe describes.

    - `medistill train recipes/sft.yaml --config_file rtx5090_qlora --run_name first`
    - `medistill train recipes/sft.yaml recipes/overlays/embedded.yaml --config_file cpu`
    - `medistill train recipes/sft.yaml --run_name first --resume`
    - `medistill train recipes/bond.yaml --help` lists the keys of a recipe
    """
    _train(context, words or [], config_file)


@app.command(**HANDED_ON)
def plan(
    context: typer.Context,
    words: Recipe = None,
    config_file: ConfigFile = None,
    vram: Annotated[
        float | None,
        typer.Option(help="GB of the GPU: also say the largest micro-batch that fits."),
    ] = None,
) -> None:
    """The memory a recipe will take, by part and phase, from the models' configs alone.

    Neither a GPU nor weights nor data are needed. `medistill train ... --dry_run` checks those too.

    - `medistill plan recipes/logit_kd.yaml --vram 32`
    - `medistill plan recipes/sft.yaml --teacher_model FOLDER_WITH_CONFIG_JSON --vram 24`
    """
    from medistill_trl import recipe

    words = words or []
    if not HELP.isdisjoint(words):
        typer.echo(context.get_help())
        _show_keys(words)
        return
    recipe.load(words)  # a wrong one is refused here
    words += [] if vram is None else ["--vram", f"{vram:g}"]
    words += [] if config_file is None else ["--config_file", _config_path(config_file)]
    _become(["python", "-m", "medistill_trl.memory", *words])


@app.command(**HANDED_ON)
def evaluate(context: typer.Context, words: Words = None) -> None:
    """Measure a run's student beside its teacher, or any model.

    - `medistill evaluate outputs/sft_first`
    - `medistill evaluate --model ID_OR_PATH --tasks benchmarks`
    """
    _become_module(context, "eval.run", words)


@app.command(**HANDED_ON)
def compare(context: typer.Context, words: Words = None) -> None:
    """Runs side by side, with intervals, tests and pictures.

    - `medistill compare outputs/sft_first outputs/logit_kd_first`
    """
    _become_module(context, "eval.compare", words)


@app.command(**HANDED_ON)
def study(context: typer.Context, words: Words = None) -> None:
    """Run many recipes under one budget; the same command goes on where it stopped.

    - `medistill study recipes/studies/ten_methods.yaml --dry_run`
    - `medistill study recipes/studies/ten_methods.yaml recipes/overlays/embedded.yaml --config_file accelerate_configs/cpu.yaml`
    """
    _become_module(context, "medistill_trl.study", words)


def _become_module(context: typer.Context, module: str, words: list[str] | None) -> None:
    words = words or []
    asks_help = not HELP.isdisjoint(words)
    if asks_help:
        typer.echo(context.get_help())
    _become(["python", "-m", module, *words], quiet=asks_help)


def _become(command: list[str], quiet: bool = False) -> None:
    """Go on as another command of this environment, and say which."""
    if not quiet:
        print(shlex.join(command), file=sys.stderr)
    here = Path(sys.executable)
    program = {"python": here, "accelerate": here.with_name("accelerate")}[command[0]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(program, [str(program), *command[1:]])


def _train(context: typer.Context, words: list[str], config_file: str | None) -> None:
    from medistill_trl import recipe

    if not HELP.isdisjoint(words):
        typer.echo(context.get_help())
        _show_keys(words)
        return
    recipe.load(words)  # a wrong one is refused here, before anything is launched
    launcher = ["accelerate", "launch"]
    if config_file is not None:
        launcher += ["--config_file", _config_path(config_file)]
    _become([*launcher, _in_repository("recipes/run.py"), *words])


def _show_keys(words: list[str]) -> None:
    """The keys of the recipe that the words name, or those of every method."""
    from rich.console import Console

    from medistill_trl import recipe, recipe_help

    rest = [word for word in words if word not in {*HELP, "--dry_run"}]
    method = recipe.load(rest).values["method"] if rest else None
    console = Console()
    for table in recipe_help.tables(method):
        console.print(table, "")
    if method is None:
        console.print(recipe_help.methods_table(), "")
    console.print(
        "Besides these, the training arguments of TRL and Transformers: --learning_rate, --max_steps, "
        "--num_train_epochs, --seed and so on."
        + ("" if method else " With a recipe before --help, the keys of its method stand here too.")
    )


def _configs() -> list[Path]:
    return sorted((REPOSITORY / CONFIGS).glob("*.yaml"))


def _config_path(name: str) -> str:
    if Path(name).is_file():
        return name
    if Path(name).name == name and (REPOSITORY / CONFIGS / f"{name}.yaml").is_file():
        return _in_repository(f"{CONFIGS}/{name}.yaml")
    names = ", ".join(path.stem for path in _configs())
    raise UserError(f"--config_file: no file {name} below {Path.cwd()}, and not one of {names}")


def _in_repository(name: str) -> str:
    """A file of the repository, as short as it can be said from here."""
    path = REPOSITORY / name
    if not path.is_file():
        raise UserError(
            f"{path}: not there; training needs the repository, of which this package was installed alone: clone "
            "it and install it with `pip install -e .`"
        )
    return name if Path.cwd() == REPOSITORY else str(path)


# --- the hub -----------------------------------------------------------------------------------------


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run directory, such as outputs/sft_first.")],
    repo_id: Annotated[
        str, typer.Option("--repo_id", help="owner/name on the hub; made if it is not there.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may see it; private without this.")
    ] = False,
    revision: Annotated[str, typer.Option(help="Branch; made if it is not there.")] = "main",
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Show what would be uploaded; ask the hub nothing.")
    ] = False,
    allow_partial: Annotated[
        bool, typer.Option("--allow_partial", help="Push a run that is not finished.")
    ] = False,
) -> None:
    """Upload a run's model, tokenizer and card to the model hub, in one commit.

    Nothing else of the run is uploaded, no pickle ever, and nothing at all if a file holds what looks like a token.
    Log in first with `hf auth login`.

    - `medistill push outputs/sft_first --repo_id me/tinyllama-meditron-sft --dry_run`
    """
    from medistill_trl import console
    from medistill_trl.hub import push as hub
    from medistill_trl.run_directory import RunDirectory

    console.set_up(main_process=True)
    target = hub.Target(repo_id, public, revision)
    directory = RunDirectory(run)
    selection = hub.plan(directory, allow_partial)
    _show_selection(selection)
    where = f"{target.repo_id}, branch {target.revision}, {'public' if public else 'private'}"
    if dry_run:
        print(f"\ndry run: would go to {where}; nothing was sent")
        return
    logging.getLogger("medistill_trl").info("pushing to %s", where)
    pushed = hub.push(directory, selection, target)
    for name in pushed.others:
        print(f"note: {name} was there before and is left as it is")
    done = (
        "pushed, and compared with what stands there"
        if pushed.changed
        else "all of it stood there already"
    )
    print(f"\n{done}: {pushed.url}")


def _show_selection(selection: "Selection") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("file", "size", "", box=box.SIMPLE_HEAD, title="uploaded", title_justify="left")
    table.columns[1].justify = "right"
    for file in selection.files:
        table.add_row(
            file.name, _human(file.size), "written now" if isinstance(file.content, bytes) else ""
        )
    table.add_row("together", _human(selection.size), "")
    console.print(table)
    table = Table("left out", "size", "why", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for item in selection.left_out:
        table.add_row(item.name, _human(item.size), item.why)
    console.print(table)
    for note in selection.notes:
        print(f"note: {note}")


def _human(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size} B"
        size /= 1000
    return f"{size:.3g} GB"


if __name__ == "__main__":
    main()
