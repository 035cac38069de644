"""A headless Chromium on PATH, driven through its DevTools protocol: how a page looks, and what it complains of."""

import asyncio
import base64
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "google-chrome")
START_SECONDS, ANSWER_SECONDS = 60, 60
MAX_MESSAGE = 1 << 27  # a screenshot of a long page, as base64

# What is wider than the page without a scroll bar of its own, and which pictures are not there.
LOOK = """(() => {
  const page = document.documentElement.clientWidth;
  const scrolls = element => {
    for (let at = element.parentElement; at; at = at.parentElement)
      if (getComputedStyle(at).overflowX !== 'visible') return true;
    return false;
  };
  const name = element => element.tagName + '.' + element.className + ' ' + element.textContent.trim().slice(0, 40);
  const wide = [...document.body.querySelectorAll('*')].filter(
    element => element.getBoundingClientRect().right > page + 0.5 && !scrolls(element));
  const pictures = [...document.images];
  return {
    page, content: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    beyond: wide.map(name), pictures: pictures.length,
    missing: pictures.filter(one => !one.complete || !one.naturalWidth || !one.clientWidth).map(one => one.alt),
    unnamed: pictures.filter(one => !one.alt).length, text: document.body.innerText,
    chosen: pictures.filter(one => one.parentElement.tagName === 'PICTURE').map(one => one.naturalWidth),
  };
})()"""


@dataclass(frozen=True)
class Look:
    """A page as it was shown: widths and height in CSS pixels, what is amiss, the text a reader sees, a PNG of it all.

    `beyond` names elements that stick out to the right without a scroll bar, `missing` and `unnamed` pictures, `chosen`
    are the widths in dots of pictures that have several sources, `requests` every address asked for beside the page.
    """

    page: int
    content: int
    height: int
    beyond: tuple[str, ...]
    pictures: int
    missing: tuple[str, ...]
    unnamed: int
    text: str
    chosen: tuple[int, ...]
    complaints: tuple[str, ...]
    requests: tuple[str, ...]
    png: bytes


def browser_on_path() -> str | None:
    """The browser's path; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def look_at(page: Path, *views: tuple[str, int]) -> list[Look]:
    """Opens a file of ours in each view: as on a `screen` or in `print`, of so many CSS pixels' width.

    Raises TimeoutError where the browser does not start or answer.
    """
    return asyncio.run(_looks(page, views))


async def _looks(page: Path, views: Sequence[tuple[str, int]]) -> list[Look]:
    async with _browser() as address, aiohttp.ClientSession() as session:
        return [await _look(session, address, page, media, width) for media, width in views]


@asynccontextmanager
async def _browser() -> AsyncIterator[str]:
    """A browser with a profile of its own, ended and deleted at the end; yields the address of its DevTools."""
    path = browser_on_path()
    assert path is not None, f"none of {', '.join(NAMES)} is on PATH"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        quiet = asyncio.subprocess.DEVNULL
        browser = await asyncio.create_subprocess_exec(
            path, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-port=0",
            f"--user-data-dir={profile}", "about:blank", stdout=quiet, stderr=quiet,
        )  # fmt: skip
        try:
            port, address = await asyncio.wait_for(_devtools(browser, Path(profile)), START_SECONDS)
            yield f"ws://127.0.0.1:{port}{address}"
        finally:
            with suppress(ProcessLookupError):
                browser.terminate()
            try:
                await asyncio.wait_for(browser.wait(), 10)
            except TimeoutError:
                browser.kill()
                await browser.wait()


async def _devtools(browser: asyncio.subprocess.Process, profile: Path) -> tuple[str, str]:
    """Port and address, which the browser writes into its profile once it listens."""
    written = profile / "DevToolsActivePort"
    while True:
        assert browser.returncode is None, f"the browser ended at its start with exit code {browser.returncode}"
        with suppress(FileNotFoundError, ValueError):
            port, address = written.read_text().split()
            return port, address
        await asyncio.sleep(0.02)


class _Tab:
    """One tab: commands with their answers, and the events that came meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket, self._number = socket, 0
        self._session: str | None = None

    async def open(self) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command. Raises RuntimeError with the browser's words where it refuses."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        while (answer := await self._receive()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    async def happened(self, method: str) -> None:
        """Waits until the browser has told of it."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(await self._receive())

    def told(self, method: str) -> list[dict[str, Any]]:
        """What the browser told under that name."""
        return [event["params"] for event in self.events if event.get("method") == method]

    async def _receive(self) -> dict[str, Any]:
        return json.loads((await self._socket.receive(ANSWER_SECONDS)).data)


async def _look(session: aiohttp.ClientSession, address: str, page: Path, media: str, width: int) -> Look:
    async with session.ws_connect(address, max_msg_size=MAX_MESSAGE) as socket:
        tab = _Tab(socket)
        await tab.open()
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.call(f"{domain}.enable")
        await tab.call("Emulation.setEmulatedMedia", media=media)
        await _resize(tab, width, 844)
        await tab.call("Page.navigate", url=page.resolve().as_uri())
        await tab.happened("Page.loadEventFired")
        # Sources of a picture that fit another width are decoded after the load.
        await tab.call(
            "Runtime.evaluate", expression="Promise.all([...document.images].map(one => one.decode().catch(() => 0)))",
            awaitPromise=True,
        )  # fmt: skip
        seen = (await tab.call("Runtime.evaluate", expression=LOOK, returnByValue=True))["result"]["value"]
        await _resize(tab, width, seen["height"])
        shot = await tab.call("Page.captureScreenshot", format="png")
        own = page.resolve().as_uri()
        requests = [told["request"]["url"] for told in tab.told("Network.requestWillBeSent")]
        found: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in seen.items()}
        return Look(
            **found,
            complaints=tuple(_complaints(tab)),
            requests=tuple(url for url in requests if url != own and not url.startswith("data:")),
            png=base64.b64decode(shot["data"]),
        )


async def _resize(tab: _Tab, width: int, height: int) -> None:
    await tab.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
    )


def _complaints(tab: _Tab) -> list[str]:
    """Errors and warnings of the console, exceptions, and what could not be loaded."""
    said = [call for call in tab.told("Runtime.consoleAPICalled") if call["type"] in ("error", "warning", "assert")]
    logged = [told["entry"] for told in tab.told("Log.entryAdded")]
    return [
        *(str(call["args"]) for call in said),
        *(entry["text"] for entry in logged if entry["level"] in ("error", "warning")),
        *(told["exceptionDetails"]["text"] for told in tab.told("Runtime.exceptionThrown")),
        *(told["errorText"] for told in tab.told("Network.loadingFailed")),
    ]
