"""The gateway process: listens for HTTP, and is a client of the broker."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import msgspec
import uvicorn
import uvloop

from tetri import atomic, log
from tetri.client import AsyncClient
from tetri.config import Config
from tetri.models import find
from tetri.net import descriptors
from tetri.net.errors import NetError
from tetri.net.lock import hold
from tetri.proc import build, open_files
from tetri.proc.cpus import pin
from tetri.proc.gateway import keys
from tetri.proc.gateway.answers import Model
from tetri.proc.gateway.api import application, listed
from tetri.proc.gateway.connection import Limits, protocol
from tetri.proc.gateway.counts import Counts
from tetri.proc.gateway.live import Live
from tetri.proc.gateway.observatory import Observatory
from tetri.proc.gateway.tokens import Tokens, token_text
from tetri.proc.gateways import BACKLOG, listening, report_of, url_of
from tetri.proc.run_directory import kept
from tetri.proc.supervise import gateway_name
from tetri.proc.texts import command

BROKER_S = 10.0  # a broker that does not answer for so long is not there
END_S = 2.0  # at the end: for clients to read the end of their answers
REPORT_S = 1.0


class Server(uvicorn.Server):
    """Ends on a signal with status 0. `close` ends the answers that are being given."""

    def __init__(self, config: uvicorn.Config, close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._close = close

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal has arrived."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, end all answers and close all connections."""
        for server in self.servers:
            server.close()
        await self._close()
        if tasks := [*self.server_state.tasks]:
            await asyncio.wait(tasks, timeout=END_S)
        for connection in [*self.server_state.connections]:  # whose clients do not read, or have no open request
            connection.transport.abort()
        await super().shutdown(sockets)


def serve(config: Config, number: int, logger: logging.Logger) -> None:
    """Run the process: bind the address, loop until a signal, clean up."""
    name = gateway_name(number)
    pin(config.gateway.cpus)
    for library in ("uvicorn", "asyncio"):
        logging.getLogger(library).handlers[:] = logger.handlers
    short = open_files.shortage(config, "gateway", descriptors.raise_limit())
    if short is not None:
        logger.warning("%s", short)
    allowed = keys.load(config.gateway.key_file)
    model = model_of(config)
    with (
        kept(config.run_dir, logger),
        hold(config.run_dir / f"{name}.lock"),
        closing(listening(config, number)) as listener,
        closing(Tokens(command(config), logger)) as tokens,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        if not (allowed or config.gateway.host in ("127.0.0.1", "::1")):
            advice = f"set gateway.key_file or {keys.VARIABLE}"
            logger.warning("everybody who reaches %s may ask: %s", url_of(listener), advice)
        runner.run(_serve(config, name, listener, allowed, model, tokens, logger))


async def _serve(
    config: Config,
    name: str,
    listener: socket.socket,
    allowed: keys.Keys,
    model: Model,
    tokens: Tokens,
    logger: logging.Logger,
) -> None:
    settings, counts = config.gateway, Counts()
    async with AsyncClient(config.clients_address, timeout=BROKER_S) as client, observed(client) as observatory:
        live = Live(observatory, counts, config.engine.block_tokens)
        limits = Limits(settings.request_s, settings.stall_s, settings.max_connections)
        made = uvicorn.Config(
            application(settings, allowed, client, model, tokens, counts, live),
            http=protocol(limits),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=settings.idle_s,
            timeout_graceful_shutdown=1,
        )

        async def close() -> None:
            observatory.close()
            await client.close()

        with reported(report_of(config.run_dir, name), url_of(listener), counts):
            logger.info("serving %s at %s", model.names[0], url_of(listener))
            await Server(made, close).serve(sockets=[listener])


def model_of(config: Config) -> Model:
    """What is served. Raises ModelError and TextError."""
    emulated = config.engine.kind == "emulated"
    root = "emulated" if emulated else str(find(config.model.name))
    names = ["emulated" if emulated else config.model.name, *listed(config.gateway.models)]
    context, _ = build.limits_of_model(config)
    return Model(names, root, context, token_text(build.tokenizer(config)), config.broker.max_open)


@asynccontextmanager
async def observed(client: AsyncClient) -> AsyncIterator[Observatory]:
    """An observatory that asks the broker meanwhile."""
    observatory = Observatory(client)
    asking = asyncio.ensure_future(observatory.run())
    asking.add_done_callback(lambda ended: ended.cancelled() or ended.result())  # the log has what it ended with
    try:
        yield observatory
    finally:
        asking.cancel()


@contextmanager
def reported(path: Path, url: str, counts: Counts) -> Iterator[None]:
    """Keep a file in the run directory that says where the gateway listens and what it has counted. Raises NetError."""

    def write(before: bytes) -> bytes:
        report = msgspec.json.encode({"url": url, **counts.plain()})
        if report != before or not path.exists():
            atomic.write_text(path, report.decode() + "\n")
        return report

    async def repeat(report: bytes) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            with suppress(OSError):  # a full disk stops no answer
                report = write(report)

    try:
        first = write(b"")
    except OSError as error:
        raise NetError(f"{path} cannot be written ({error.strerror})") from None
    task = asyncio.ensure_future(repeat(first))
    try:
        yield
    finally:
        task.cancel()
        path.unlink(missing_ok=True)


@click.command()
@click.option("--number", type=click.IntRange(0, 63), default=0, help="Which of several gateways; each has its port.")
@build.configured("tetri-gateway")
def main(config: Config, number: int) -> None:
    """Run an HTTP gateway of a cluster: OpenAI's API."""
    serve(config, number, log.start(gateway_name(number)))
