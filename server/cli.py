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
_PANELS = {  # by their first setting
    "config": "Settings",
    "model": "What is served",
    "max_num_seqs": "Engine",
    "tensor_parallel_size": "Devices and hosts",
    "compile_cache_dir": "Engine process",
    "host": "Server",
    "max_num_queued_reqs": "Limits",
}
_LONGEST_CHOICES = 24  # characters that a column of choices may take from the names of flags

app = typer.Typer(
    name="grok-server",
    help="Serve Grok-1 models through an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# What `complete` and `chat` have in common.
_Url = Annotated[
    str | None,
    typer.Option("--url", envvar=f"{ENV_PREFIX}URL", metavar="URL", help="the server (default: http://127.0.0.1:8000, else an own one)"),
]
_ApiKey = Annotated[str | None, typer.Option("--api-key", envvar=f"{ENV_PREFIX}API_KEY", metavar="TEXT", help="the server's API key")]
_Model = Annotated[str | None, typer.Option("--model", metavar="TEXT", help="the model's name there; for an own server its directory")]
_Temperature = Annotated[float | None, typer.Option("--temperature", metavar="X", help="0 is greedy (default: the server's, 1)")]
_TopP = Annotated[float | None, typer.Option("--top-p", metavar="X", help="share of the likeliest tokens to choose from (default: 1)")]
_Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="the same seed gives the same text (default: a random one)")]
_Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="end before this text; may be given several times")]


def main() -> None:
    """The console script."""
    app()


def serve(model_argument: str | None = None, **flags: Any) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C. With a --node-rank above 0, compute for the node that does."""
    given = _given(**flags)
    try:
        if model_argument is not None and given.setdefault("model", model_argument) != model_argument:
            raise ConfigError(f"two models are named, {model_argument} and --model {given['model']}; name one")
        settings = load_settings(given)
        if settings.node_rank:
            from server.node import follow_until_signal

            return follow_until_signal(settings)
        from server.lifecycle import serve as serve_until_signal

        serve_until_signal(settings)
    except EngineError as error:
        _fail(error)


@app.command()
def complete(
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="what to continue; - or none reads stdin", show_default=False)
    ] = None,
    url: _Url = None,
    api_key: _ApiKey = None,
    model: _Model = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="most tokens to generate")] = 256,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    seed: _Seed = None,
    stop: _Stop = None,
    echo: Annotated[bool, typer.Option("--echo", help="print the text before what continues it")] = False,
) -> None:
    """Continue a text.

    Uses the server that runs here or at --url; with none running here, starts one for the time being. Ctrl-C ends the text.
    """
    fields = _given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    try:
        from server.terminal import Asked
        from server.terminal import complete as complete_text

        status = complete_text(Asked(url=url, api_key=api_key, model=model, fields=fields), text, is_echoed=echo)
    except EngineError as error:
        _fail(error)
    raise typer.Exit(status)


@app.command()
def chat(
    url: _Url = None,
    api_key: _ApiKey = None,
    model: _Model = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="what the model is told before the conversation")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="most tokens of one answer")] = None,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    seed: _Seed = None,
    stop: _Stop = None,
) -> None:
    """Talk with a model. Without a terminal, answer what stdin says.

    Uses the server that runs here or at --url; with none running here, starts one for the time being. Ctrl-C stops an answer.
    """
    fields = _given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    try:
        from server.terminal import Asked
        from server.terminal import chat as chat_in_terminal

        status = chat_in_terminal(Asked(url=url, api_key=api_key, model=model, fields=fields), system=system)
    except EngineError as error:
        _fail(error)
    raise typer.Exit(status)


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
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="model directory: the release, a Hugging Face layout, or converted before")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="a new directory, or one of an interrupted conversion")],
    weights: Annotated[str | None, typer.Option("--weights", metavar="int8|bfloat16|int4", help="form of the matrices")] = None,
    group: Annotated[int, typer.Option("--group", metavar="64|128", help="rows that share a scale, of int4")] = 128,
    verify: Annotated[bool, typer.Option("--verify", help="convert nothing: compare DST with SRC, tensor by tensor")] = False,
    compare_prompt: Annotated[
        list[str] | None,
        typer.Option("--compare-prompt", metavar="TEXT", help="compute this with both and show the error; may be repeated"),
    ] = None,
    compare_token_ids: Annotated[
        list[str] | None, typer.Option("--compare-token-ids", metavar="N,N,...", help="the same, where there is no tokenizer")
    ] = None,
) -> None:
    """Write a checkpoint as safetensors, in 8, 16 or 4 bits.

    An interrupted conversion is taken up again by the same command; until it has ended nothing loads its directory.
    """
    try:
        from server.conversion import ComparedPrompts, convert_or_compare

        prompts = ComparedPrompts(texts=tuple(compare_prompt or ()), token_ids=tuple(compare_token_ids or ()))
        convert_or_compare(source, target, weights=weights, group=group, is_compared=verify, prompts=prompts)
    except EngineError as error:
        _fail(error)


@app.command()
def plan(
    model: Annotated[str, typer.Option("--model", metavar="TEXT", help="a preset, which needs no files, or a model directory")] = "grok-1",
    device: Annotated[str, typer.Option("--device", metavar="TEXT", help="a100-80, h100-80, h200, b200 or mi300x")] = "h100-80",
    device_memory: Annotated[str | None, typer.Option("--device-memory", metavar="BYTES", help="another size of one, e.g. 48GiB")] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "--tp", "-tp", min=1, metavar="N", help="devices that share each matrix")
    ] = 8,
    data_parallel_size: Annotated[
        int,
        typer.Option("--data-parallel-size", "--dp", "-dp", min=1, metavar="N", help="parts with so many devices and the whole model each"),
    ] = 1,
    enable_expert_parallel: Annotated[
        bool, typer.Option("--enable-expert-parallel", help="whole experts on each device instead of slices of all")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="float32|bfloat16|int8|int4",
            help="form of the weights (default: the directory's; int8 without one)",
            show_default=False,
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", metavar="auto|float32|bfloat16|int8|fp8", help="of the cache")
    ] = "auto",
    block_size: Annotated[int, typer.Option("--block-size", min=1, metavar="N", help="tokens per block of the cache")] = 16,
    max_model_len: Annotated[int | None, typer.Option("--max-model-len", min=1, metavar="N", help="longest sequence, in tokens")] = None,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", min=1, metavar="N", help="sequences running at once")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option("--max-num-batched-tokens", min=1, metavar="N", help="tokens in one step")] = 256,
    gpu_memory_utilization: Annotated[
        float, typer.Option("--gpu-memory-utilization", min=0.01, max=1, metavar="X", help="share of a device's memory to use")
    ] = 0.9,
    compile: Annotated[
        bool, typer.Option("--compile", help="compile the whole step from shapes alone and list its collectives; takes minutes")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """Show whether a model fits a machine, before anything is loaded.

    Bytes on each device, how many tokens of cache and sequences fit, what speed to expect, and what would fit where it does not (status 1).
    """
    try:
        from server.planning import Machine, Request, show_plan

        machine = Machine(
            device=device,
            device_memory=device_memory,
            tensor=tensor_parallel_size,
            data=data_parallel_size,
            is_expert_parallel=enable_expert_parallel,
            memory_share=gpu_memory_utilization,
        )
        request = Request(
            model=model,
            weights=weights,
            kv=kv_cache_dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
        )
        status = show_plan(request, machine, as_json=json, is_compiled=compile)
    except EngineError as error:
        _fail(error)
    raise typer.Exit(status)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(importlib.metadata.version("grok-server"))


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, [])}


def _fail(error: EngineError) -> NoReturn:
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    if (plan := getattr(error, "plan", None)) is not None:
        from server.planning import show_refusal

        show_refusal(plan)
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
        metavar = _metavar(field.annotation)
        if len(metavar) > _LONGEST_CHOICES:
            metavar, help_text = "TYPE", f"{metavar.replace('|', ', ')}: {help_text}"
        option = typer.Option(
            f"{flag_name(name)}/--no-{flag_name(name)[2:]}" if field.default is True else flag_name(name),
            help=help_text,
            metavar=None if is_switch else metavar,
            show_default=False,
            rich_help_panel=panel,
        )
        yield _flag(name, bool if is_switch else list[str] if get_origin(field.annotation) is tuple else str, option)
    for alias in ALIASES:
        names = [f"-{alias}", f"--{alias}"] if alias in ("tp", "dp") else [flag_name(alias)]
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
