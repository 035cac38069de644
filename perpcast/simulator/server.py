"""The running exchange: REST and WebSocket on one loopback port, in an event loop or in a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

from aiohttp import web

from perpcast.errors import SetupError
from perpcast.simulator.clock import Clock
from perpcast.simulator.market import Market
from perpcast.simulator.rest import RestApi
from perpcast.simulator.stream import Stream

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """Where the exchange listens; the two URLs are what `exchange.rest_url` and `exchange.ws_url` expect."""

    port: int

    @property
    def rest_url(self) -> str:
        """The host of the REST endpoints, without a path."""
        return f"http://{HOST}:{self.port}"

    @property
    def ws_url(self) -> str:
        """The public linear WebSocket, path included."""
        return f"ws://{HOST}:{self.port}/v5/public/linear"


@asynccontextmanager
async def serve(market: Market, clock: Clock, port: int = 0) -> AsyncIterator[Address]:
    """Runs the exchange inside the `async with`; port 0 takes a free one. Raises SetupError where the port is taken."""
    stream = Stream(market, clock)
    app = web.Application()
    app.router.add_get("/v5/public/linear", stream.handle)
    app.add_routes(RestApi(market, clock).routes())
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, HOST, port)
    try:
        await _start(site, port)
        pushing = asyncio.create_task(stream.push())
        try:
            yield Address(runner.addresses[0][1])
        finally:
            pushing.cancel()
            with suppress(asyncio.CancelledError):
                await pushing
    finally:
        await runner.cleanup()


async def _start(site: web.TCPSite, port: int) -> None:
    try:
        await site.start()
    except OSError as error:
        reason = error.strerror or error
        raise SetupError(
            f"port {port} cannot be used for the local exchange ({reason}); give another with --port"
        ) from None


@contextmanager
def serve_in_thread(market: Market, clock: Clock, port: int = 0) -> Iterator[Address]:
    """Runs the exchange in a thread while the caller goes on; `clock` must not be stepped from the caller's thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="local exchange", daemon=True)
    thread.start()
    try:
        running = serve(market, clock, port)
        address = asyncio.run_coroutine_threadsafe(_enter(running), loop).result()
        try:
            yield address
        finally:
            asyncio.run_coroutine_threadsafe(_leave(running), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _enter(running: AbstractAsyncContextManager[Address]) -> Address:
    return await running.__aenter__()


async def _leave(running: AbstractAsyncContextManager[Address]) -> None:
    await running.__aexit__(None, None, None)
