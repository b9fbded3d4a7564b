"""The one settings tree: flags over environment over YAML over defaults.

Every field is a flag (`max_num_seqs` is `--max-num-seqs`), an environment variable (`GROK_SERVER_MAX_NUM_SEQS`) and a YAML key; its
description is the flag's help. `server/cli.py` makes the flags from these fields. Imports neither fastapi nor jax, so that help is quick.
What is checked here needs no file but the YAML; `server/engine_options.py` checks what depends on the model.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BeforeValidator, ByteSize, Field, InstanceOf, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

import configs
from engine.errors import ConfigError
from server.api_keys import ApiKey, ApiKeys, read_key_file
from server.limits import Limits

ENV_PREFIX = "GROK_SERVER_"
DEFAULT_MODEL = "grok-1-tiny"
MAX_LOGPROBS = 128  # what the compiled programs can be asked for

# Names that SGLang's users know, and vLLM's short form.
ALIASES = {
    "model_path": "model",
    "tokenizer_path": "tokenizer",
    "context_length": "max_model_len",
    "mem_fraction_static": "gpu_memory_utilization",
    "tp_size": "tensor_parallel_size",
    "tp": "tensor_parallel_size",
    "dp_size": "data_parallel_size",
    "dp": "data_parallel_size",
    "max_running_requests": "max_num_seqs",
    "max_queued_requests": "max_num_queued_reqs",
    "page_size": "block_size",
}

# What Kubernetes' LeaderWorkerSet tells every pod of a group.
LEADER_WORKER_SET = {"nnodes": "LWS_GROUP_SIZE", "node_rank": "LWS_WORKER_INDEX", "master_addr": "LWS_LEADER_ADDRESS"}

SECRETS = frozenset({"api_key"})  # fields whose values no message repeats


def _each(value: object) -> list[str]:
    """One text with commas, or a list of them: a flag that was repeated, a YAML list."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in cast("list[object]", texts)):
        raise ValueError("must be text, or a list of texts")
    return [part.strip() for text in cast("list[str]", texts) for part in text.split(",")]


def _digested(value: object) -> tuple[ApiKey, ...]:
    return tuple(ApiKey.of(key) for key in _each(value))


def _origins(value: object) -> tuple[str, ...]:
    origins = tuple(_each(value))
    for origin in origins:
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise ValueError("must be * or origins like https://app.example, without a slash at the end")
    return origins


_SETTING_OF_LIMIT = {"max_queued_sequences": "max_num_queued_reqs", "max_queued_tokens": "max_num_queued_tokens"}  # others' names for them
_LIMITS = Limits()
_Count = Annotated[int, Field(ge=1)]
_Bound = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Keys = Annotated[tuple[InstanceOf[ApiKey], ...], NoDecode, BeforeValidator(_digested)]
_Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)]


class Settings(BaseSettings):
    """What an operator can choose."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, protected_namespaces=())

    config: Path | None = Field(None, description="YAML file with any of these settings, by their names")

    # what is served
    model: Path | None = Field(None, description=f"directory with the weights, config.json and tokenizer.model (default: {DEFAULT_MODEL})")
    served_model_name: str | None = Field(None, min_length=1, description="the model's id in the API (default: the directory's name)")
    tokenizer: Path | None = Field(None, description="SentencePiece model (default: tokenizer.model in the model directory)")
    chat_template: str | None = Field(
        None, min_length=1, description="Jinja template of conversations: a file, or the template itself (default: Grok's own format)"
    )
    skip_tokenizer_init: bool = Field(False, description="serve token ids without any tokenizer")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: float32 on a CPU, bfloat16 on a GPU")
    cpu_weights: Literal["float", "packed"] = Field(
        "float", description="what 8- and 4-bit matrices become on a CPU; packed keeps them as small as they are, and is slower"
    )
    max_model_len: _Count | None = Field(None, description="prompt plus output of one sequence, in tokens (default: the model's context)")
    max_logprobs: int = Field(_LIMITS.max_logprobs, ge=0, le=MAX_LOGPROBS, description="most top log-probabilities per token")

    # the engine
    max_num_seqs: _Count = Field(64, description="sequences running at once, in each data-parallel part")
    max_num_batched_tokens: _Count = Field(256, description="tokens computed in one step, in each data-parallel part")
    block_size: _Count = Field(16, description="tokens per block of the KV cache")
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = Field(
        "auto", description="number type of the KV cache; auto: that of the computation"
    )
    kv_cache_memory_bytes: ByteSize | None = Field(
        None,
        description="size of the KV cache of each data-parallel part, e.g. 2GiB (default: 512MiB or one full sequence on a CPU, what the "
        "weights leave on a GPU)",
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory to use")
    tensor_parallel_size: _Count = Field(1, description="devices that share each matrix")
    data_parallel_size: _Count = Field(
        1, description="parts that share the requests, each with so many devices, the whole model and a KV cache of its own"
    )
    enable_expert_parallel: bool = Field(False, description="whole experts on each device instead of slices of all")
    processes_per_node: _Count = Field(1, description="engine processes that share a machine's devices")
    nnodes: _Count = Field(1, description="machines that serve the model together; each runs this command, with the same settings")
    node_rank: _Bound = Field(0, description="this machine's number among them; 0 serves HTTP, the others only compute")
    master_addr: str | None = Field(None, min_length=1, description="address of the machine with node rank 0, on a private network")
    master_port: int = Field(29501, ge=1, le=65535, description="port there where its engine waits for the others'")
    compile_cache_dir: Path | None = Field(
        None, description="keeps compiled programs between starts (default: in the user's cache directory)"
    )
    engine_stall_timeout: float = Field(
        8.0, ge=1, allow_inf_nan=False, description="seconds of silence, or 20 of the largest steps, before a ready engine is replaced"
    )
    engine_start_timeout: float = Field(
        1800.0, ge=1, allow_inf_nan=False, description="seconds without progress before an engine that loads or compiles is replaced"
    )

    engine_standby: bool = Field(True, description="keep a process beside the engine that takes its place at once if it dies; costs memory")

    # the server
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes any free one")
    api_key: _Keys = Field(
        (),
        description="key that every request needs then, probes aside; several by repeating or with commas. Better in a file: others on "
        "the machine see the arguments of processes",
    )
    api_key_file: Path | None = Field(None, description="file with one key a line, if wanted with a space and a name behind it")
    allowed_origins: _Origins = Field(
        (), description="web pages' origins that browsers let in, * for all; several by repeating or with commas"
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="serve /metrics on this port instead, without a key (default: on the same port, with one)"
    )
    metrics_host: str = Field("127.0.0.1", min_length=1, description="address of the metrics port")
    shutdown_notice: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="seconds after SIGTERM in which requests are still taken, while /readyz fails already"
    )
    shutdown_timeout: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="seconds that running requests get to finish once no more are taken"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log lines shown")
    log_format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, else json")

    # limits; server/limits.py says who checks which
    max_num_queued_reqs: _Bound = Field(_LIMITS.max_queued_sequences, description="sequences waiting beyond those running; more get a 503")
    max_num_queued_tokens: _Bound = Field(
        _LIMITS.max_queued_tokens, description="tokens (prompt plus max_tokens) open beyond what the KV cache holds; more get a 503"
    )
    max_tenant_sequences: _Count | None = Field(
        _LIMITS.max_tenant_sequences, description="sequences of one tenant open at once; more get a 429 (default: no bound of its own)"
    )
    max_tenant_tokens: _Count | None = Field(
        _LIMITS.max_tenant_tokens,
        description="tokens (prompt plus max_tokens) of one tenant open at once; more get a 429 (default: no bound)",
    )
    max_connections: _Count = Field(
        _LIMITS.max_connections, description="open connections; then the one that has waited longest goes, or the new one gets a 503"
    )
    max_pipelined: _Bound = Field(_LIMITS.max_pipelined, description="requests that a connection may send in advance")
    write_timeout_s: _Seconds = Field(
        _LIMITS.write_timeout_s, description="seconds in which a client must take 16 KiB of its answer, or the rest of it"
    )
    max_header_bytes: _Count = Field(_LIMITS.max_header_bytes, description="request line and headers of one request")
    max_headers: _Count = Field(_LIMITS.max_headers, description="header lines of one request")
    max_body_bytes: _Count = Field(_LIMITS.max_body_bytes, description="body of one request")
    max_all_body_bytes: _Count = Field(_LIMITS.max_all_body_bytes, description="bodies of all requests that are read or answered")
    body_timeout_s: _Seconds = Field(_LIMITS.body_timeout_s, description="seconds that a body may take to arrive")
    max_discarded_bytes: _Bound = Field(
        _LIMITS.max_discarded_bytes, description="of a refused body, read so that the client sees the refusal"
    )
    max_prompts: _Count = Field(_LIMITS.max_prompts, description="prompts in one request")
    max_messages: _Count = Field(_LIMITS.max_messages, description="messages in one conversation")
    max_rendered_chars: _Count = Field(
        _LIMITS.max_rendered_chars, description="characters of a conversation as the chat template writes it"
    )
    max_sequences: _Count = Field(_LIMITS.max_sequences, description="prompts times choices of one request")
    max_stop_strings: _Bound = Field(_LIMITS.max_stop_strings, description="stop strings of one request")
    max_stop_chars: _Count = Field(_LIMITS.max_stop_chars, description="characters of one stop string")
    max_stop_token_ids: _Bound = Field(_LIMITS.max_stop_token_ids, description="stop token ids of one request")
    max_logit_bias: _Bound = Field(_LIMITS.max_logit_bias, description="entries of one logit_bias")
    max_allowed_token_ids: _Count = Field(_LIMITS.max_allowed_token_ids, description="ids in one allowed_token_ids")
    max_bad_words: _Bound = Field(_LIMITS.max_bad_words, description="bad words of one request")
    max_cache_salt_chars: _Count = Field(_LIMITS.max_cache_salt_chars, description="characters of one cache_salt")
    max_timeout_s: _Seconds = Field(_LIMITS.max_timeout_s, description="longest timeout that a request may ask for, in seconds")
    max_fields: _Count = Field(_LIMITS.max_fields, description="fields at the top of a body, unknown ones included")
    max_answer_logprobs: _Count = Field(
        _LIMITS.max_answer_logprobs, description="log-probabilities in one answer, over all its candidates and top entries"
    )
    max_stored_responses: _Bound = Field(
        _LIMITS.max_stored_responses, description="responses of /v1/responses kept in memory; the least recently used goes first"
    )
    max_stored_bytes: _Bound = Field(_LIMITS.max_stored_bytes, description="size of the kept responses together")
    max_grammar_chars: _Count = Field(_LIMITS.max_grammar_chars, description="characters of a JSON schema, regular expression or grammar")
    grammar_timeout_s: float = Field(
        _LIMITS.grammar_timeout_s, ge=0.1, allow_inf_nan=False, description="seconds of a processor that compiling one grammar may take"
    )
    grammar_memory_bytes: ByteSize = Field(
        ByteSize(_LIMITS.grammar_memory_bytes), ge=1, description="memory that compiling one grammar may take, e.g. 64MiB"
    )
    max_queued_grammars: _Count = Field(
        _LIMITS.max_queued_grammars, description="grammars waiting to be compiled for the first time; more get a 503"
    )
    retry_after_s: _Seconds = Field(_LIMITS.retry_after_s, description="seconds after which a refused client may come back")
    keep_alive_s: _Seconds = Field(_LIMITS.keep_alive_s, description="seconds of silence on a stream before a keep-alive comment")
    max_message_chars: _Count = Field(_LIMITS.max_message_chars, description="characters of an error message")
    max_ignored_fields: _Bound = Field(_LIMITS.max_ignored_fields, description="unknown fields named in the response header")

    @property
    def limits(self) -> Limits:
        """The limits' part of the settings."""
        return Limits(**{field.name: getattr(self, _SETTING_OF_LIMIT.get(field.name, field.name)) for field in fields(Limits)})

    def read_keys(self) -> ApiKeys:
        """All keys, the file's among them. Raises `ConfigError` for a file that is wrong."""
        return ApiKeys([*self.api_key, *(read_key_file(self.api_key_file) if self.api_key_file is not None else ())])

    @property
    def model_dir(self) -> Path:
        """Where the weights are, absolute. Raises `ConfigError` where there is no such directory."""
        model_dir = Path(os.path.abspath(self.model)) if self.model is not None else default_model_dir()
        if not model_dir.is_dir():
            raise ConfigError(f"--model: {model_dir} is not a directory")
        return model_dir

    @property
    def model_name(self) -> str:
        """The model's id in the API."""
        if self.served_model_name is not None:
            return self.served_model_name
        model_dir = self.model_dir
        return model_dir.parent.name if model_dir.name in ("ckpt", "ckpt-0") else model_dir.name

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come in as arguments; then the environment; then the YAML file that either of them names; then what a cluster says."""
        path = (env_settings() | init_settings()).get("config")
        file_settings = InitSettingsSource(settings_cls, _read_yaml(Path(path)) if path else {})
        group_settings = InitSettingsSource(settings_cls, _leader_worker_set())
        return init_settings, env_settings, file_settings, group_settings


def load_settings(flags: Mapping[str, Any]) -> Settings:
    """Settings from `flags` (field or alias name to value, only those given), the environment and the YAML file.

    Raises `ConfigError` with one line for the first thing that is wrong.
    """
    try:
        return Settings(**{field_name(name): value for name, value in flags.items()})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        complaint = first["msg"].removeprefix("Value error, ")
        found = "" if name in SECRETS else f", found {first['input']!r}"
        raise ConfigError(f"{flag_name(name)}: {complaint[:1].lower()}{complaint[1:]}{found}") from None


def field_name(name: str) -> str:
    """The field that a flag, YAML key or alias means; a name that means none comes back as it is."""
    name = name.replace("-", "_")
    return ALIASES.get(name, name)


def flag_name(field: str) -> str:
    """How a field is called on the command line."""
    return "--" + field.replace("_", "-")


def default_model_dir() -> Path:
    """The model that comes along, in `models/` beside the packages: in a checkout as in an installed wheel (decision 3).

    Raises `ConfigError` where it is not there.
    """
    model_dir = Path(configs.__path__[0]).parent / "models" / DEFAULT_MODEL
    if not model_dir.is_dir():
        raise ConfigError(f"the default model {DEFAULT_MODEL} is not installed; name a model directory with --model")
    return model_dir


def limits_by_setting(limits: Limits) -> dict[str, int | float | None]:
    """Every limit, by the name of the setting that changes it."""
    return {_SETTING_OF_LIMIT.get(field.name, field.name): getattr(limits, field.name) for field in fields(Limits)}


def _leader_worker_set() -> dict[str, Any]:
    return {name: os.environ[variable] for name, variable in LEADER_WORKER_SET.items() if os.environ.get(variable)}


def _read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by field. Raises `ConfigError` for anything but a mapping of known names."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: cannot read {path}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} must hold a mapping of settings, found {type(content).__name__}")
    known = Settings.model_fields.keys() - {"config"}
    values: dict[str, Any] = {}
    for key, value in cast("dict[object, Any]", content).items():
        name = field_name(str(key))
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"--config: {path} has the unknown key {key!r}{hint}")
        if name in values:
            raise ConfigError(f"--config: {path} sets {name} twice")
        if value is not None:
            values[name] = value
    return values
