"""The `glmflow` command. Everything heavy is imported by the command that needs it, so that --help answers at once."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from glm.errors import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The RLHF pipeline's own commands.")


data_app = typer.Typer(no_args_is_help=True, help="Look at datasets without training on them.")
app.add_typer(data_app, name="data")


@data_app.command(
    "check", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def data_check(context: typer.Context) -> None:
    """Count what would be kept, dropped and cut of datasets, and why; --help lists the options."""
    from glm.data.check import main as check_data

    raise typer.Exit(check_data(context.args))


@data_app.command("changed")
def data_changed(files: Annotated[list[str] | None, typer.Argument(help="which; for the record")] = None) -> None:
    """Tell Prefect that there is new data: its automation runs retrain/weekly."""
    from flows.data_events import emit

    emit(files or [])
    typer.echo("told Prefect; `prefect flow-run ls` shows the run that follows")


@data_app.command("watch")
def data_watch(
    every: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 10.0,
) -> None:
    """Look at data/ until stopped, and tell Prefect of each new file there."""
    from flows import ROOT
    from flows.data_events import watch
    from glm.config import load_params

    watch(ROOT / load_params().data.dataset_dir, every)


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="model folder or hub id")] = "models/export",
    adapter: Annotated[
        list[str] | None, typer.Option(help="adapter folder on it; several are applied in order")
    ] = None,
    system: Annotated[str, typer.Option(help="system prompt")] = "",
    max_new_tokens: int = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time")] = 0.95,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 0.7,
) -> None:
    """Talk to a model in the terminal: `clear` forgets the dialogue, `stop` or Ctrl-D ends it."""
    from apps.chat import talk

    talk(model, adapter or [], system, max_new_tokens, temperature, top_p)


@app.command()
def params(path: Annotated[Path, typer.Argument(help="parameter file")] = Path("params.yaml")) -> None:
    """Check a parameter file and show every knob with its value and meaning."""
    from rich.console import Console
    from rich.table import Table

    from glm.config import Params, load_params

    values = load_params(path)
    table = Table("name", "value", "meaning")
    for name, value, meaning in _knobs(Params, values):
        table.add_row(name, value, meaning)
    Console().print(table)


@app.command()
def register() -> None:
    """Register models/export in MLflow as challenger (the flow does this itself; `dvc repro` does not)."""
    import json

    from flows.registry import register as register_export
    from glm.config import load_params
    from tasks.record import keep_record
    from tasks.tracking import parent_of

    record = Path("runs/export.json")
    run_id = json.loads(record.read_text(encoding="utf-8"))["run_id"] if record.exists() else None
    values = load_params()
    version = register_export("models/export", run_id, values)
    keep_record(values, version, parent_of(run_id))
    typer.echo(f"{values.promote.model_name} version {version} is the challenger")


@app.command()
def promote(
    version: Annotated[
        str | None, typer.Argument(help="version of the registered model, or an alias such as challenger")
    ] = None,
    reason: Annotated[str, typer.Option(help="why; kept with the version")] = "",
    run: Annotated[str | None, typer.Option(help="the version that this MLflow run made")] = None,
    version_option: Annotated[str | None, typer.Option("--version", help="the same as the argument")] = None,
) -> None:
    """Make a registered version the champion by hand, whatever the gate said of it."""
    from flows import champion
    from glm.config import load_params

    given = [value for value in (version, run, version_option) if value]
    if len(given) != 1:
        raise InputError("promote: name one of VERSION, --version VERSION and --run RUN_ID")
    values = load_params()
    if run:
        number, before = champion.promote_run(run, reason, values)
    else:
        number, before = champion.promote(given[0], reason, values)
    if number == before:
        typer.echo(f"{values.promote.model_name} version {number} is the champion already; nothing was changed")
    else:
        typer.echo(f"{values.promote.model_name} version {number} is the champion (before: {before or 'none'})")


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="why; kept with the version")],
    steps: Annotated[int, typer.Option(min=1, help="how many champions back")] = 1,
) -> None:
    """Make the previous champion the champion again; asked twice, the one before it."""
    from flows import champion
    from glm.config import load_params

    values = load_params()
    number, before = champion.rollback(reason, values, steps)
    typer.echo(f"{values.promote.model_name} version {number} is the champion again (before: {before or 'none'})")


@app.command()
def champions() -> None:
    """Show every move of the alias champion: when, who, to which version and why."""
    from rich.console import Console
    from rich.table import Table

    from flows.champion import moves
    from glm.config import load_params

    table = Table("when", "what", "version", "before", "by", "why")
    for move in moves(load_params()):
        table.add_row(move.at, move.action, move.version, move.before or "", move.by, move.reason)
    Console().print(table)


@app.command()
def lineage(
    target: Annotated[str, typer.Argument(help="models:/NAME@champion, models:/NAME/3, a run id, or a path")],
    json_file: Annotated[Path | None, typer.Option("--json", help="write it to this file too")] = None,
    graph: Annotated[Path | None, typer.Option(help="draw it into this .png, .svg or .pdf file")] = None,
) -> None:
    """Show which data, code, parameters and earlier models made a model, as it was recorded."""
    from rich.console import Console

    from flows.lineage import trace
    from flows.lineage_view import draw, tree
    from glm.files import write_json

    if graph and graph.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--graph {graph}: the file's name must end with .png, .svg or .pdf")
    found = trace(target)
    Console().print(tree(found), soft_wrap=True)
    if json_file:
        write_json(json_file, found.as_json())
    if graph:
        draw(found, graph)


@app.command()
def reproduce(
    target: Annotated[str, typer.Argument(help="models:/NAME@champion, models:/NAME/3, or a run id")],
) -> None:
    """Make a model again from its recorded code, parameters and data, and compare. Exit status 1: it differs."""
    from rich.console import Console

    from flows.reproduce import reproduce as make_again

    raise typer.Exit(make_again(target, Console()))


def _knobs(section: Any, values: Any, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, value, meaning) of every field of a section of the schema."""
    rows = []
    for name, field in section.model_fields.items():
        value = getattr(values, name)
        if hasattr(value, "model_fields_set"):
            rows += _knobs(type(value), value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", "" if value is None else str(value), field.description or ""))
    return rows


def main() -> None:
    """Entry point of the installed command. Wrong input is told in its one message, with exit status 2."""
    sys.path.insert(0, "")  # the code of the folder one stands in, as `python -m` has it
    try:
        app()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
