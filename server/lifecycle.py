"""One life of the server: check, listen, start the engine, serve, drain, stop.

    1. Everything that can be wrong is looked at first: model directory, configuration, tokenizer, port. Each is one line of error.
    2. The socket listens before the engine starts, so that a taken port is known at once and `/livez` answers while the model loads.
    3. The supervisor starts the engine process; while it imports and loads, this process imports and builds the HTTP application.
    4. SIGTERM: readiness fails at once, and for a short while requests are still taken, so that load balancers turn away before anybody is
       refused. Ctrl-C, and SIGTERM before the first readiness, know no such while: nobody sends requests by way of readiness then.
    5. Nothing new is taken; what runs may finish until the timeout, if need be in another engine process; the rest is told; the engine
       ends. A second signal ends everything at once.

Owns the signals and the order of these things, not the things themselves.
"""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import uvicorn
import uvloop

from engine.config import EngineOptions
from engine.errors import ConfigError
from engine.tokenizer import Tokenizer, find_tokenizer
from server.api_keys import ApiKeys, is_open_to_others
from server.console import Console
from server.engine_options import engine_options
from server.limits import Limits
from server.open_files import connections_within
from server.settings import Settings, limits_by_setting
from server.supervisor import ENGINE_COMMAND, STANDBY_DELAY_S, Supervisor

if TYPE_CHECKING:  # fastapi takes seconds to import
    from fastapi import FastAPI

    from server.admission import Admission
    from server.chat_template import ChatTemplate
    from server.grammar_check import GrammarCheck
    from server.services import Services

log = structlog.get_logger(__name__)

FAREWELL_S = 5  # for the last bytes of responses whose generation is over
POLL_S = 0.05
METRICS_CONNECTIONS = 16  # on a port of their own
IDLE_CONNECTION_S = (
    75  # longer than clients and proxies keep one in their pools, so that they close first and no request meets a closing one
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that is known before anything is started."""

    settings: Settings
    options: EngineOptions
    tokenizer: Tokenizer | None
    chat_template: "ChatTemplate | None"  # None for the default
    keys: ApiKeys
    limits: Limits
    listener: socket.socket
    metrics_listener: socket.socket | None

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server."""
        return _url(self.listener)

    @property
    def metrics_url(self) -> str | None:
        """Where the metrics are, if they have a port of their own."""
        return None if self.metrics_listener is None else f"{_url(self.metrics_listener)}/metrics"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return ip_address(self.listener.getsockname()[0].partition("%")[0]).is_loopback


def _url(listener: socket.socket) -> str:
    address = listener.getsockname()
    host, port = str(address[0]), int(address[1])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def prepare(settings: Settings) -> Prepared:
    """Check and open everything that does not need the engine. Raises `EngineError` with one line for the first thing that is wrong."""
    options = engine_options(settings)
    tokenizer = None
    if not settings.skip_tokenizer_init:
        path = find_tokenizer(settings.model_dir, settings.tokenizer)
        tokenizer = Tokenizer.load(path)
        options = replace(options, tokenizer_path=str(path.absolute()))
        if tokenizer.vocab_size > options.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size:,} pieces, the model only {options.model.vocab_size:,}; "
                "choose another with --tokenizer"
            )
    keys = settings.read_keys()
    limits = replace(settings.limits, max_connections=connections_within(settings.max_connections))
    chat_template = _chosen_chat_template(settings, tokenizer, limits=limits)
    listener = listen(settings.host, settings.port)
    try:
        metrics_listener = None
        if settings.metrics_port is not None:
            metrics_listener = listen(settings.metrics_host, settings.metrics_port, of="metrics-")
    except AddressError:
        listener.close()
        raise
    return Prepared(
        settings=settings,
        options=options,
        tokenizer=tokenizer,
        chat_template=chat_template,
        keys=keys,
        limits=limits,
        listener=listener,
        metrics_listener=metrics_listener,
    )


def _chosen_chat_template(settings: Settings, tokenizer: Tokenizer | None, *, limits: Limits) -> "ChatTemplate | None":
    if settings.chat_template is None:
        return None
    if tokenizer is None:
        raise ConfigError("--chat-template: without a tokenizer there is no chat; leave out --skip-tokenizer-init")
    from server.chat_template import ChatTemplate

    return ChatTemplate.chosen(settings.chat_template, tokenizer=tokenizer, max_chars=limits.max_rendered_chars)


def listen(host: str, port: int, *, of: str = "") -> socket.socket:
    """A listening TCP socket. Raises `AddressError` where that cannot be had, a port in use among others; `of` begins its flags' names."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise AddressError(f"--{of}host: cannot listen on {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise AddressError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --{of}port (0 takes any free one)"
        ) from None
    return listener


def serve(settings: Settings, *, engine_command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Run the server until a signal ends it.

    Raises `EngineError` where it cannot start; where the error has an `exit_status`, the process should end with that, else with 2.
    """
    prepared = prepare(settings)
    with ExitStack() as listeners, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for listener in (prepared.listener, prepared.metrics_listener):
            if listener is not None:
                listeners.enter_context(listener)
        runner.run(_Life(prepared, engine_command=engine_command).run())


class AddressError(ConfigError):
    """The server cannot listen where it should."""

    exit_status = 4


class _Life:
    """Made and run once, on the main thread's event loop."""

    def __init__(self, prepared: Prepared, *, engine_command: Sequence[str]) -> None:
        self._prepared = prepared
        self._engine_command = engine_command
        self._stop_asked = asyncio.Event()
        self._signum: int | None = None  # the first signal
        settings = prepared.settings
        self._console = Console(
            url=prepared.url,
            model_name=settings.model_name,
            has_tokenizer=prepared.tokenizer is not None,
            needs_key=bool(prepared.keys),
            metrics_url=prepared.metrics_url,
            limits=limits_by_setting(prepared.limits),
        )

    async def run(self) -> None:
        self._supervisor = Supervisor(
            self._prepared.options,
            watcher=self._console,
            command=self._engine_command,
            stall_timeout_s=self._prepared.settings.engine_stall_timeout,
            start_timeout_s=self._prepared.settings.engine_start_timeout,
            standby_delay_s=STANDBY_DELAY_S if self._has_standby else None,
        )
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._signalled, signum)
        self._console.starting()
        supervising = asyncio.create_task(self._supervisor.run())
        try:
            await self._serve_http(until=supervising)
        finally:
            self._supervisor.stop()
            self._console.close()
            await supervising

    @property
    def _has_standby(self) -> bool:
        """Processes of a group cannot compile ahead: their runtimes meet when all are there."""
        return self._prepared.settings.engine_standby and self._prepared.options.group is None

    async def _serve_http(self, *, until: "asyncio.Task[None]") -> None:
        """Serve until the engine is given up or a signal came; then drain."""
        services, servers = await asyncio.to_thread(self._configure_http)
        serving = [asyncio.create_task(http.serve(sockets=[listener])) for http, listener in servers]
        stop_asked = asyncio.create_task(self._stop_asked.wait())
        once_ready = asyncio.create_task(self._once_ready(services.grammar_check))
        await asyncio.wait({until, *serving, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
        stop_asked.cancel()
        once_ready.cancel()
        await self._drain(services.admission, until=until)
        for http, _ in servers:
            http.should_exit = True
        await asyncio.gather(*serving)

    async def _once_ready(self, grammar_check: "GrammarCheck | None") -> None:
        """Log the limits. Have a process to check grammars in before one comes, though after the first requests, which come first."""
        while not self._supervisor.client.is_ready:
            await asyncio.sleep(POLL_S)
        self._console.log_limits()
        await asyncio.sleep(STANDBY_DELAY_S)
        if grammar_check is not None:
            grammar_check.start()

    def _configure_http(self) -> "tuple[Services, list[tuple[_Server, socket.socket]]]":
        """What the routes work with, and the servers with their sockets.

        The imports take seconds, so this runs in a thread: progress shows and the engine's first messages are read meanwhile.
        """
        from server.app import create_app, create_metrics_app
        from server.observability import configure_logging

        prepared, settings = self._prepared, self._prepared.settings
        as_json = settings.log_format == "json" or (settings.log_format == "auto" and not os.isatty(2))
        configure_logging(as_json=as_json, level=settings.log_level.upper())
        self._warn_of_what_is_open()
        app = create_app(
            client=self._supervisor.client,
            tokenizer=prepared.tokenizer,
            chat_template=prepared.chat_template,
            model=prepared.options.model,
            model_name=settings.model_name,
            limits=prepared.limits,
            keys=prepared.keys,
            allowed_origins=settings.allowed_origins,
            has_metrics=prepared.metrics_listener is None,
            grammar_check=self._grammar_check(),
        )
        services: Services = app.state.services
        servers = [(_server(app, limits=prepared.limits), prepared.listener)]
        if prepared.metrics_listener is not None:
            limits = replace(prepared.limits, max_connections=METRICS_CONNECTIONS)
            servers.append((_server(create_metrics_app(services), limits=limits), prepared.metrics_listener))
        gc.collect()
        gc.freeze()  # all that was imported and built stays for good: looking through it again and again stalls every request by 0.1 s
        return services, servers

    def _grammar_check(self) -> "GrammarCheck | None":
        from server.grammar_check import GrammarCheck

        options, model = self._prepared.options, self._prepared.options.model
        if options.tokenizer_path is None:
            return None
        path, limits = Path(options.tokenizer_path), self._prepared.limits
        return GrammarCheck(tokenizer_path=path, vocab_size=model.vocab_size, eos_token=model.eos_token, limits=limits)

    def _warn_of_what_is_open(self) -> None:
        prepared, settings = self._prepared, self._prepared.settings
        if not prepared.keys and not prepared.is_local:
            log.warning(
                "everyone who reaches this address may use the server: set --api-key-file, or listen on 127.0.0.1", host=settings.host
            )
        if settings.api_key_file is not None and is_open_to_others(settings.api_key_file):
            log.warning("every user of this machine may read the file of API keys: take the right away with chmod o-r")

    async def _drain(self, admission: "Admission", *, until: "asyncio.Task[None]") -> None:
        """Announce the end, take nothing new, wait for what runs; fail what is left at the timeout, or once there will be no engine."""
        client, settings = self._supervisor.client, self._prepared.settings
        admission.retire()
        if self._signum == signal.SIGTERM and client.info is not None:
            await asyncio.wait({until}, timeout=settings.shutdown_notice)
        admission.drain()
        idle = asyncio.create_task(_until_idle(admission))
        await asyncio.wait({idle, until}, timeout=settings.shutdown_timeout, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        client.fail_open("the server is shutting down")

    def _signalled(self, signum: int) -> None:
        if self._stop_asked.is_set():
            self._console.close()
            self._supervisor.kill()
            os._exit(128 + signum)
        self._signum = signum
        self._stop_asked.set()
        self._console.stopping(self._supervisor.client.num_open, timeout_s=self._prepared.settings.shutdown_timeout)


async def _until_idle(admission: "Admission") -> None:
    while admission.num_open:
        await asyncio.sleep(POLL_S)


def _server(app: "FastAPI", *, limits: Limits) -> "_Server":
    from server.http_protocol import bounded_http

    config = uvicorn.Config(
        app,
        http=bounded_http(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here depends on who asks, or on the scheme
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=FAREWELL_S,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the order of stopping is `_Life`'s."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield
