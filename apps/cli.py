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

    record = Path("runs/export.json")
    run_id = json.loads(record.read_text(encoding="utf-8"))["run_id"] if record.exists() else None
    values = load_params()
    version = register_export("models/export", run_id, values)
    typer.echo(f"{values.promote.model_name} version {version} is the challenger")


@app.command()
def sync() -> None:
    """Send to MLflow what steps kept while it could not be reached; close the runs of processes that were killed."""
    from glm.config import load_params
    from tasks.tracking import close_killed_runs, open_store
    from tasks.unsent import send_unsent

    client, experiment_id = open_store(load_params().tracking.experiment)
    sent = send_unsent(client)
    typer.echo(f"sent: {len(sent)}; closed as killed: {len(close_killed_runs(client, experiment_id))}")


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="version of the registered model, or an alias such as challenger")],
    reason: Annotated[str, typer.Option(help="why; kept with the version")],
) -> None:
    """Make a registered version the champion by hand."""
    from flows.registry import promote as make_champion
    from glm.config import load_params

    values = load_params()
    number, before = make_champion(version, reason, values)
    typer.echo(f"{values.promote.model_name} version {number} is the champion (before: {before or 'none'})")


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
