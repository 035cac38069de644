"""A TCP proxy that breaks lines on demand: resets, refused ports, half-open connections, lost replies."""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

_HOST = "127.0.0.1"
_CHUNK = 1 << 16
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no time: close sends RST and drops what was not sent


class _Link:
    """One connection: the client's socket and ours to the target."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server = socket.socket()
        for end in (self.client, self.server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is passed on must not wait for more
        self.brought = 0  # bytes from the server since the last `cut_after`
        self.sent_tail = b""  # the client's last bytes, in which a pattern may have begun
        self.over = False  # from now on nothing is passed on


class TcpProxy:
    """Passes bytes between `port` and the target, in a thread of its own; `with` starts and ends it.

    Every command may be called from any thread and has taken effect when it returns. `port` stays the same through
    `refuse` and `accept`. A reset or a close by either peer is passed on to the other as what it was.
    """

    def __init__(self, target_port: int, target_host: str = _HOST) -> None:
        self._target = (target_host, target_port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp proxy", daemon=True)
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._cut_after_bytes: int | None = None
        self._cut_pattern: bytes | None = None
        self._listener = _bound(0)
        self._accepting: asyncio.Task[None] | None = None
        self.port: int = self._listener.getsockname()[1]
        self.accepted = 0  # connections so far

    def __enter__(self) -> Self:
        self._thread.start()
        self.accept()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._listener.close()

    def cut(self) -> None:
        """Resets every connection; new ones are welcome."""
        self._do(self._cut())

    def refuse(self) -> None:
        """Resets every connection; new ones are refused, as where nothing listens."""
        self._do(self._refuse())

    def accept(self) -> None:
        """Ends `refuse`."""
        self._do(self._accept())

    def freeze(self) -> None:
        """Holds all bytes, both ways; connections stay open and new ones are accepted, but nobody answers."""
        self._do(self._freeze())

    def thaw(self) -> None:
        """Ends `freeze`: what was held goes on its way."""
        self._do(self._thaw())

    def cut_after(self, bytes_from_server: int) -> None:
        """Resets, once, the next connection to which the server sends so many bytes from now on; these get through."""
        self._do(self._arm(bytes_from_server, self._cut_pattern))

    def cut_when_sent(self, pattern: bytes) -> None:
        """Resets the client, once, when it has sent `pattern`: the server gets that, and its reply is lost."""
        self._do(self._arm(self._cut_after_bytes, pattern))

    def _do(self, command: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(command, self._loop).result(10)

    async def _cut(self) -> None:
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _refuse(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None
            self._listener.close()
            self._listener = _bound(self.port)  # bound but not listening: refused, and nobody else can take it
        await self._cut()

    async def _accept(self) -> None:
        if self._accepting is None:
            self._listener.listen(128)
            self._accepting = asyncio.create_task(self._welcome())

    async def _freeze(self) -> None:
        self._flowing.clear()

    async def _thaw(self) -> None:
        self._flowing.set()

    async def _arm(self, bytes_from_server: int | None, pattern: bytes | None) -> None:
        self._cut_after_bytes, self._cut_pattern = bytes_from_server, pattern
        for link in self._links.values():
            link.brought, link.sent_tail = 0, b""

    async def _welcome(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            self.accepted += 1
            link = _Link(client)
            task = asyncio.create_task(self._serve(link))
            self._links[task] = link
            task.add_done_callback(self._forget)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        """A link that was cut before its first step has not closed anything."""
        link = self._links.pop(task)
        for end in (link.client, link.server):
            if end.fileno() >= 0:
                _reset_on_close(end)
                end.close()

    async def _serve(self, link: _Link) -> None:
        orderly = False
        try:
            await self._flowing.wait()
            await self._loop.sock_connect(link.server, self._target)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump_to_server(link))
                pumps.create_task(self._pump_to_client(link))
            orderly = not link.over
        except* OSError:
            await self._flowing.wait()  # in a frozen network nobody hears of a reset either
        finally:
            if not orderly:
                _reset_on_close(link.client)
                if not link.over:
                    _reset_on_close(link.server)
            link.client.close()
            link.server.close()

    async def _pump_to_server(self, link: _Link) -> None:
        while data := await self._receive(link.client):
            await self._loop.sock_sendall(link.server, data)
            if self._completes_pattern(link, data):
                self._cut_pattern, link.over = None, True
                raise ConnectionResetError
        link.server.shutdown(socket.SHUT_WR)

    def _completes_pattern(self, link: _Link, data: bytes) -> bool:
        if self._cut_pattern is None:
            return False
        sent = link.sent_tail + data
        link.sent_tail = sent[-len(self._cut_pattern) :]
        return self._cut_pattern in sent

    async def _pump_to_client(self, link: _Link) -> None:
        while (data := await self._receive(link.server)) and not link.over:
            link.brought += len(data)
            most = self._cut_after_bytes
            if most is not None and link.brought >= most:
                self._cut_after_bytes = None
                await self._loop.sock_sendall(link.client, data[: len(data) - (link.brought - most)])
                raise ConnectionResetError
            await self._loop.sock_sendall(link.client, data)
        if not link.over:
            link.client.shutdown(socket.SHUT_WR)

    async def _receive(self, source: socket.socket) -> bytes:
        data = await self._loop.sock_recv(source, _CHUNK)
        await self._flowing.wait()
        return data


def _bound(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((_HOST, port))
    listener.setblocking(False)
    return listener


def _reset_on_close(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
