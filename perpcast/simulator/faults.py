"""Faults on purpose: which requests the exchange spoils, how often, and in which way.

A test adds rules and asks afterwards what came; nothing is spoiled by itself. Every endpoint so far is a read, so that
a request lost and an answer lost come to the same: there is one `reset` for both.
"""

import asyncio
import gzip
import socket
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

Honest = Callable[[], Awaitable[web.StreamResponse]]  # what the exchange would have answered
Spoil = Callable[[web.Request, Honest], Awaitable[web.StreamResponse]]
Json = dict[str, Any]


@dataclass
class Rule:
    """Requests to spoil. `fired` counts them; setting `times` to 0 ends the rule, None lets it go on for ever."""

    spoil: Spoil
    path: str
    symbol: str | None
    skip: int
    times: int | None
    fired: int = 0

    def takes(self, request: web.Request) -> bool:
        """Whether this request is one of them; counts it."""
        if self.path not in request.path or self.symbol not in (None, request.query.get("symbol")):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None and self.fired >= self.times:
            return False
        self.fired += 1
        return True


class Faults:
    """The rules of one exchange, and a count of what was asked of it; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._came: Counter[str] = Counter()

    def add(
        self, spoil: Spoil, *, path: str = "", symbol: str | None = None, skip: int = 0, times: int | None = 1
    ) -> Rule:
        """Spoils `times` requests (None: all from then on), after `skip` that pass.

        Those whose path contains `path` and that ask for `symbol`; without a path, WebSocket handshakes as well. Rules
        are tried in the order of adding: the first that applies wins, and later ones do not see the request.
        """
        rule = Rule(spoil, path, symbol, skip, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def requests(self, path: str = "") -> int:
        """How many requests came whose path contains `path`, those that were turned away included."""
        with self._lock:
            return sum(number for came, number in self._came.items() if path in came)

    def count(self, request: web.Request) -> None:
        """Takes note of a request."""
        with self._lock:
            self._came[request.path] += 1

    async def answer(self, request: web.Request, honest: Honest) -> web.StreamResponse:
        """The answer of the first rule that applies, else the honest one."""
        with self._lock:
            rule = next((rule for rule in self._rules if rule.takes(request)), None)
        return await (rule.spoil(request, honest) if rule else honest())


def status(code: int, body: bytes = b"", headers: Mapping[str, str] = {}) -> Spoil:
    """An answer of this HTTP status instead."""

    async def spoil(request: web.Request, honest: Honest) -> web.StreamResponse:
        return web.Response(status=code, body=body, headers=headers)

    return spoil


def ret_code(code: int, message: str, headers: Mapping[str, str] = {}) -> Spoil:
    """HTTP 200 with this retCode and an empty result, at the market's time."""
    return _edited(lambda whole: whole | {"retCode": code, "retMsg": message, "result": {}}, headers)


def envelope(edit: Callable[[Json], Json]) -> Spoil:
    """The honest JSON, edited as a whole."""
    return _edited(edit)


def result(edit: Callable[[Json], Json]) -> Spoil:
    """The honest JSON with its `result` edited."""
    return _edited(lambda whole: whole | {"result": edit(whole["result"])})


def rows(edit: Callable[[list[list[str]]], list[Any]]) -> Spoil:
    """The honest answer of `market/kline` with its rows edited: texts, newest first."""
    return result(lambda page: page | {"list": edit(page["list"])})


def body(content: bytes) -> Spoil:
    """HTTP 200 with these bytes, whatever they are."""
    return status(200, content, {"Content-Type": "application/json"})


def truncated_gzip() -> Spoil:
    """The honest answer compressed, and the second half of it missing; its length says that it is whole."""

    async def spoil(request: web.Request, honest: Honest) -> web.StreamResponse:
        packed = gzip.compress(_body(await honest()), mtime=0)
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        return web.Response(body=packed[: len(packed) // 2], headers=headers)

    return spoil


def delay(seconds: float) -> Spoil:
    """The honest answer, late by the clock of the exchange's event loop."""

    async def spoil(request: web.Request, honest: Honest) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await honest()

    return spoil


def reset(after_bytes: int = 0) -> Spoil:
    """The connection reset (TCP RST) after so many bytes of the answer's body; after 0, before any header."""

    async def spoil(request: web.Request, honest: Honest) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        assert request.transport is not None
        if after_bytes:
            content = _body(await honest())
            answer.content_length = len(content)
            await answer.prepare(request)
            await answer.write(content[:after_bytes])
            await _until_sent(request.transport)
        _reset(request.transport)
        return answer

    return spoil


def _edited(edit: Callable[[Json], Json], headers: Mapping[str, str] = {}) -> Spoil:
    async def spoil(request: web.Request, honest: Honest) -> web.StreamResponse:
        answer = await honest()
        content = orjson.dumps(edit(orjson.loads(_body(answer))))
        return web.Response(body=content, status=answer.status, headers={"Content-Type": "application/json", **headers})

    return spoil


def _body(answer: web.StreamResponse) -> bytes:
    if not isinstance(answer, web.Response) or not isinstance(answer.body, bytes):
        raise TypeError("this fault needs the body of an answer: name the path of a REST endpoint with it")
    return answer.body


async def _until_sent(transport: asyncio.WriteTransport) -> None:
    """Until the kernel has all bytes, or nobody is there to take them."""
    while transport.get_write_buffer_size() and not transport.is_closing():
        await asyncio.sleep(0.001)


def _reset(transport: asyncio.WriteTransport) -> None:
    # Without lingering a close is a reset, and what the other side has not read yet is gone.
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
