"""The `glmflow` command. Everything heavy is imported by the command that needs it, so that --help answers at once."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from apps.passed_on import PassedOn, parser_of
from glm.errors import InputError

app = typer.Typer(no_args_is_help=True, help="The RLHF pipeline's own commands.")
ALL_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}

data_app = typer.Typer(no_args_is_help=True, help="Look at datasets, and clear the cache of tokenised ones.")
app.add_typer(data_app, name="data")


@data_app.command("check", cls=PassedOn, context_settings=ALL_WORDS, add_help_option=False)
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


@data_app.command("clean")
def data_clean(
    days: Annotated[float, typer.Option(min=0, help="remove what was not used for so many days; 0 removes all")] = 30,
) -> None:
    """Remove tokenised sets from the cache; the next run that wants one makes it again."""
    from glm.data.cache import clean
    from tasks.tokenized import cache_folder

    removed = clean(cache_folder(), days)
    typer.echo(f"{len(removed)} sets removed from {cache_folder()}, {sum(removed.values()) / 1e6:,.1f} MB")


MODEL_HELP = "folder, hub id, models:/NAME@champion, models:/NAME/3, or an MLflow run"
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="adapter folder on it; several in their order")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time")]
Dtype = Literal["float32", "bfloat16", "float16"]
TopP = Annotated[float, typer.Option(min=0.01, max=1.0)]


@app.command(cls=PassedOn, context_settings=ALL_WORDS, add_help_option=False)
def run(context: typer.Context) -> None:
    """Run the pipeline or a recipe, RECIPE.yaml; -S NAME=VALUE overrides a parameter, --help lists the options."""
    parser_of("run").parse_args(context.args)  # before Prefect's import, which takes a second
    from flows.rlhf_pipeline import main as run_pipeline

    raise typer.Exit(run_pipeline(context.args))


@app.command(cls=PassedOn, context_settings=ALL_WORDS, add_help_option=False)
def compare(context: typer.Context) -> None:
    """Run methods, algorithms or other variants of the parameters on the same data, in one table; --help lists more."""
    parser_of("compare").parse_args(context.args)
    from flows.compare_methods import main as compare_variants

    raise typer.Exit(compare_variants(context.args))


@app.command()
def chat(
    model: Model = "models/export",
    adapter: Adapters = None,
    system: Annotated[str, typer.Option(help="system prompt; empty: the one of training, if any")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Temperature = 0.95,
    top_p: TopP = 0.7,
    seed: Annotated[int | None, typer.Option(help="for the same answers each time")] = None,
) -> None:
    """Talk to a model in the terminal, or give it a question a line through a pipe."""
    from apps.chat import talk
    from apps.models import resolve

    talk(resolve(model, adapter or []), system, max_new_tokens, temperature, top_p, seed)


@app.command()
def serve(
    model: Model = "models/export",
    adapter: Adapters = None,
    name: Annotated[str, typer.Option(help="of the model, for clients; empty: as it was named here")] = "",
    system: Annotated[str, typer.Option(help="system prompt where a request has none")] = "",
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="GLMFLOW_API_KEY", help="that clients must send")] = None,
    allow_anonymous: Annotated[bool, typer.Option(help="no key, though other machines can reach it")] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="requests answered at once")] = 32,
    max_length: Annotated[
        int | None, typer.Option(min=32, help="tokens of prompt and answer; 2048, or less if the model has less")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="requests that may wait; then 429")] = 256,
    max_body: Annotated[int, typer.Option(min=1000, help="bytes of a request")] = 2_000_000,
    temperature: Temperature = 0.95,
    top_p: TopP = 0.7,
    dtype: Annotated[Dtype | None, typer.Option(help="empty: as stored")] = None,
    log_content: Annotated[bool, typer.Option(help="also log what is asked and answered")] = False,
    engine: Annotated[
        Literal["own", "vllm"], typer.Option(help="who computes; vllm: `vllm serve`, found in PATH, behind this server")
    ] = "own",
    engine_url: Annotated[
        str | None, typer.Option(help="of a vLLM (or glmflow) server with this model that runs already")
    ] = None,
    enable_lora: Annotated[
        Path | None, typer.Option(help="folder below which clients may load adapters (own engine); empty: they may not")
    ] = None,
    engine_api_key: Annotated[str | None, typer.Option(envvar="GLMFLOW_ENGINE_API_KEY", help="that it wants")] = None,
) -> None:
    """Serve a model by OpenAI's HTTP interface; requests of many clients are answered together."""
    from apps.models import resolve
    from apps.serve.app import Options
    from apps.serve.run import EngineOptions, check_binding
    from apps.serve.run import serve as run_server

    check_binding(host, api_key, allow_anonymous)
    if enable_lora and (engine_url or engine != "own"):
        raise InputError("enable-lora: adapters are loaded into this server's own engine; vLLM has the option itself")
    wanted = EngineOptions(engine, engine_url, engine_api_key, max_batch, max_length, max_waiting, dtype)
    resolved = resolve(model, adapter or [])
    options = Options(
        name=name or resolved.name,
        source_prefix=system,
        temperature=temperature,
        top_p=top_p,
        api_key=api_key,
        max_body=max_body,
        log_content=log_content,
        lora_folder=enable_lora,
    )
    run_server(resolved, options, wanted, host=host, port=port)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder to write; it must not be there yet")],
    adapter: Adapters = None,
    what: Annotated[Literal["merged", "adapter"], typer.Option(help="adapter: what was trained alone")] = "merged",
    layout: Annotated[
        Literal["transformers", "authors"], typer.Option(help="authors: as ChatGLM's authors publish")
    ] = "transformers",
    quantization: Annotated[
        Literal["none", "nf4", "cpm-int8", "cpm-int4"], typer.Option(help="cpm: the authors'")
    ] = "none",
    dtype: Annotated[Dtype | None, typer.Option(help="empty: as stored")] = None,
    max_shard_size: Annotated[str, typer.Option(help="of a file: 500MB, 2GB")] = "2GB",
    push_to_hub: Annotated[str | None, typer.Option(help="OWNER/NAME of a model on the hub; HF_TOKEN is you")] = None,
    private: Annotated[bool, typer.Option(help="of a model that is new on the hub")] = True,
    overwrite: Annotated[bool, typer.Option(help="replace an export that is there")] = False,
) -> None:
    """Write a model as a folder for others, with a model card, and prove that it answers as its source."""
    import signal

    from apps.export import export_model

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clearing away what is begun
    values = {
        "what": what,
        "layout": layout,
        "quantization": quantization,
        "max_shard_size": max_shard_size,
        "push_to_hub": push_to_hub,
        "private": private,
    } | ({"dtype": dtype} if dtype else {})
    done, sent = export_model(model, out, values, adapter or [], overwrite=overwrite)
    typer.echo(f"{done.folder}: {done.parameters:,} parameters, {done.size / 1e6:,.1f} MB; README.md is its card")
    against = "the values of its rounded weights" if done.loss is not None else "its source"
    typer.echo(f"loaded again: logits within {done.max_logit_difference:.1e} of {against}")
    if done.loss is not None:
        typer.echo(f"loss by rounding: {done.source_loss:.3f} → {done.loss:.3f} nats a token on eight short answers")
    if sent:
        typer.echo(f"sent: {sent}")


@app.command()
def web(
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    user: Annotated[str | None, typer.Option(envvar="GLMFLOW_WEB_USER", help="that visitors must name")] = None,
    password: Annotated[str | None, typer.Option(envvar="GLMFLOW_WEB_PASSWORD", help="that visitors must give")] = None,
    show: Annotated[bool, typer.Option("--open", help="open a browser")] = False,
) -> None:
    """Serve the web page: train, compare, chat, rank answers, promote. Beyond this machine it wants a password."""
    try:
        from apps.web.run import serve as serve_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError("web: the page needs gradio: pip install -r requirements.lock") from None
    serve_page(host, port, user, password, show)


@app.command()
def doctor() -> None:
    """Check Python, packages, hardware, servers and data, and say what to do; exit status 1 if something is wrong."""
    from apps.doctor import main as examine

    raise typer.Exit(examine())


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
        table.add_row(
            move.at[:16].replace("T", " "), move.action, move.version, move.before or "", move.by, move.reason
        )
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
    Console().print(tree(found))
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
    """Entry point of the installed command. Wrong input and failures are one message, with exit status 2 and 1."""
    sys.path.insert(0, "")  # the code of the folder one stands in, as `python -m` has it
    from flows.errors import FlowError

    try:
        app()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except FlowError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        from tasks.tracking import store_failure

        if not (failure := store_failure(error)):
            raise
        print(failure, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
