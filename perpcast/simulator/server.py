"""The running exchange: REST and WebSocket on one loopback port, in an event loop or in a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from perpcast.errors import SetupError
from perpcast.simulator.clock import Clock
from perpcast.simulator.faults import Faults
from perpcast.simulator.ip_limit import IpLimit
from perpcast.simulator.market import Market
from perpcast.simulator.rest import RestApi
from perpcast.simulator.stream import Stream

HOST = "127.0.0.1"
_STREAM_PATH = "/v5/public/linear"


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
        return f"ws://{HOST}:{self.port}{_STREAM_PATH}"


@asynccontextmanager
async def serve(
    market: Market,
    clock: Clock,
    port: int = 0,
    *,
    faults: Faults | None = None,
    ip_limit: bool = True,
    keys: Mapping[str, str] = {},
) -> AsyncIterator[Address]:
    """Runs the exchange inside the `async with`; port 0 takes a free one. Raises SetupError where the port is taken.

    `faults` spoil some answers, `ip_limit` bans who asks too often as Bybit does (by the wall, whatever the market's
    clock), `keys` are the API keys that exist, with their secrets.
    """
    stream = Stream(market, clock)
    app = web.Application(middlewares=[_gate(faults or Faults(), ip_limit)])
    app.router.add_get(_STREAM_PATH, stream.handle)
    app.add_routes(RestApi(market, clock, keys).routes())
    # An answer that is delayed is given up with the client that waited for it.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
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


def _gate(faults: Faults, limited: bool) -> Middleware:
    """What every request passes before it is answered."""
    limit = IpLimit(asyncio.get_running_loop().time)

    @web.middleware
    async def pass_gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        faults.count(request)
        # WebSocket connections have a limit of their own, which is not modelled.
        if limited and request.path != _STREAM_PATH and not limit.admits():
            return web.Response(status=403, text="access too frequent")
        if request.method == "GET" and request.body_exists:
            return web.Response(status=403, text="GET with a body")
        return await faults.answer(request, lambda: handler(request))

    return pass_gate


async def _start(site: web.TCPSite, port: int) -> None:
    try:
        await site.start()
    except OSError as error:
        reason = error.strerror or error
        raise SetupError(
            f"port {port} cannot be used for the local exchange ({reason}); give another with --port"
        ) from None


@contextmanager
def serve_in_thread(
    market: Market,
    clock: Clock,
    port: int = 0,
    *,
    faults: Faults | None = None,
    ip_limit: bool = True,
    keys: Mapping[str, str] = {},
) -> Iterator[Address]:
    """Runs the exchange in a thread while the caller goes on; `clock` must not be stepped from the caller's thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="local exchange", daemon=True)
    thread.start()
    try:
        running = serve(market, clock, port, faults=faults, ip_limit=ip_limit, keys=keys)
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
