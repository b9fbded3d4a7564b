"""The command `grok-server`: arguments in, one function call out.

The flags of `serve` are made from the fields of `Settings`, so that help, environment, YAML and documentation cannot drift apart. Whatever
is wrong with what the operator asked for is one line on stderr and exit status 2. fastapi and jax are never imported for help.
"""

import importlib.metadata
import inspect as python_inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import typer

from engine.errors import ConfigError, EngineError
from server.settings import ALIASES, ENV_PREFIX, Settings, default_model_dir, flag_name, load_settings

# The first field of each group in the help, in the order of `Settings`.
_PANELS = {"config": "Settings", "model": "What is served", "max_num_seqs": "Engine", "host": "Server", "max_num_queued_reqs": "Limits"}

app = typer.Typer(
    name="grok-server",
    help="Serve Grok-1 models through an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """The console script."""
    app()


def serve(model_argument: str | None = None, **flags: Any) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C."""
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    try:
        if model_argument is not None and given.setdefault("model", model_argument) != model_argument:
            raise ConfigError(f"two models are named, {model_argument} and --model {given['model']}; name one")
        settings = load_settings(given)
        from server.lifecycle import serve as serve_until_signal

        serve_until_signal(settings)
    except EngineError as error:
        _fail(error)


@app.command()
def inspect(
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="model directory (default: the model that comes along)")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="read every byte; find non-finite numbers and wrong digests")] = False,
) -> None:
    """Show and check the tensors of a checkpoint."""
    try:
        from server.inspection import show_checkpoint

        show_checkpoint(default_model_dir() if directory is None else directory, is_verified=verify)
    except EngineError as error:
        _fail(error)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(importlib.metadata.version("grok-server"))


def _fail(error: EngineError) -> NoReturn:
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(getattr(error, "exit_status", 2))


def _parameters() -> Iterator[python_inspect.Parameter]:
    """One flag per field. Values arrive as text: checking them is the settings' work, in one place for flags, environment and YAML."""
    positional = python_inspect.Parameter.POSITIONAL_OR_KEYWORD
    argument = typer.Argument(metavar="[MODEL]", help="the same as --model", show_default=False)
    yield python_inspect.Parameter("model_argument", positional, default=None, annotation=Annotated[str | None, argument])
    panel = ""
    for name, field in Settings.model_fields.items():
        panel = _PANELS.get(name, panel)
        is_switch = field.annotation is bool
        help_text = field.description or ""
        if field.default not in (None, ()) and not is_switch:
            help_text += f" (default: {field.default})"
        option = typer.Option(
            f"{flag_name(name)}/--no-{flag_name(name)[2:]}" if field.default is True else flag_name(name),
            help=help_text,
            metavar=None if is_switch else _metavar(field.annotation),
            show_default=False,
            rich_help_panel=panel,
        )
        yield _flag(name, bool if is_switch else list[str] if get_origin(field.annotation) is tuple else str, option)
    for alias in ALIASES:
        names = ["-tp", "--tp"] if alias == "tp" else [flag_name(alias)]
        yield _flag(alias, str, typer.Option(*names, hidden=True))


def _flag(name: str, kind: Any, option: Any) -> python_inspect.Parameter:
    return python_inspect.Parameter(name, python_inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _metavar(annotation: Any) -> str:
    """What a flag's value looks like: the choices, or a hint at the type."""
    origin = get_origin(annotation)
    if origin is Literal:
        return "|".join(map(str, get_args(annotation)))
    if origin is Annotated:
        return _metavar(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return _metavar(next(choice for choice in get_args(annotation) if choice is not type(None)))
    if origin is tuple:
        return "TEXT"
    return {int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(annotation, "BYTES")


def _register_serve() -> None:
    parameters = list(_parameters())
    serve.__signature__ = python_inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    epilog = f"Every flag is also an environment variable, e.g. {ENV_PREFIX}PORT, and a key of the --config file, e.g. port. "
    epilog += "The names are vLLM's; SGLang's for the common ones are understood, too."
    app.command(epilog=epilog)(serve)


_register_serve()
