"""The conversation with a Metabase instance: requests with time-outs, waiting until it is up, its version, who asks.

Shapes are those that server majors 58 to 64 share; Metabase does not promise them for any other.
"""

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlencode

from perpcast.errors import ConfigError, PerpcastError, SetupError

DEFAULT_URL = "http://127.0.0.1:3333"
TESTED_MAJORS = range(58, 65)

_ANSWER_SECONDS = 120.0  # a question may take as long as its role's statement time-out; the first ones find cold caches
_POLL_SECONDS = 1.0
_HEALTH_SECONDS = 10.0
_PAGE = 200
_BROKEN_OFF = (ConnectionError, TimeoutError, http.client.IncompleteRead)


class MetabaseError(PerpcastError):
    """An answer of Metabase that is not the one asked for; `status` is None where the connection broke off."""

    def __init__(self, message: str, status: int | None = None, body: Any = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class QuestionError(MetabaseError):
    """A question that does not run."""


class UnreachableError(SetupError):
    """Nothing listens there."""


class OtherProgramError(SetupError):
    """What answers there is not Metabase."""


@dataclass(frozen=True)
class Account:
    """Who asks: the administrator whom provisioning makes in a new instance. The password is never shown."""

    email: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """What a question answered: the names of its columns, and how many rows."""

    columns: tuple[str, ...]
    rows: int


class Metabase:
    """A Metabase instance; after `sign_in` every request carries its session.

    Each request raises UnreachableError, OtherProgramError, or MetabaseError with what the instance said. None is
    repeated: what a lost answer has written is found again by the next run.
    """

    def __init__(self, url: str) -> None:
        if re.fullmatch(r"https?://[^/?#:]+(:\d+)?/?", url) is None:
            raise ConfigError(f"the address of Metabase: expected one like {DEFAULT_URL}, received {url!r}")
        self.url = url.rstrip("/")
        self._session: str | None = None
        # No proxy of the environment: the instance is on this machine or beside it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, **query: Any) -> Any:
        """What a GET answers, from JSON."""
        return self._ask("GET", f"{path}?{urlencode(query, doseq=True)}" if query else path)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What a POST answers, from JSON."""
        return self._ask("POST", path, body)

    def put(self, path: str, body: Mapping[str, Any]) -> Any:
        """What a PUT answers, from JSON."""
        return self._ask("PUT", path, body)

    def collections(self) -> list[dict[str, Any]]:
        """Every collection that is not in the trash; the root, which is none of its own, excluded."""
        return [each for each in self.get("/api/collection") if isinstance(part(each, "id"), int)]

    def items(self, collection: int, model: str) -> list[dict[str, Any]]:
        """What lies in a collection, `model` one of card and dashboard; archived items and subfolders excluded."""
        found: list[dict[str, Any]] = []
        for offset in count(0, _PAGE):
            page = self.get(f"/api/collection/{collection}/items", models=model, limit=_PAGE, offset=offset)
            found += part(page, "data")
            if offset + _PAGE >= part(page, "total"):
                break
        return found

    def query(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Runs a question. Raises QuestionError for one that fails: Metabase tells so under HTTP 202 as well."""
        try:
            result = self.post(path, body)
        except MetabaseError as error:
            if error.status is None:
                raise
            raise QuestionError(str(error), error.status) from None
        if part(result, "status") != "completed":
            raise QuestionError(_reason(result))
        data = part(result, "data")
        return Answer(tuple(part(column, "name") for column in part(data, "cols")), len(part(data, "rows")))

    def wait_until_ready(self, seconds: float, tell: Callable[[str], None]) -> dict[str, Any]:
        """The instance's public properties, as soon as it is up; `tell` hears what it is waited for.

        Its health turns green a little before its API is dependable, so both are asked. Raises SetupError.
        """
        deadline = time.monotonic() + seconds
        told = ""
        while True:
            properties, state = self._look()
            if properties is not None:
                return properties
            if state != told:
                tell(f"waiting for Metabase at {self.url}: {state}")
                told = state
            if time.monotonic() >= deadline:
                raise SetupError(
                    f"Metabase at {self.url} is not ready after {seconds:g} s: {state}; start it with `docker compose "
                    "up -d` in the folder metabase, and see `docker compose logs` there"
                )
            time.sleep(_POLL_SECONDS)

    def sign_in(self, properties: Mapping[str, Any], account: Account) -> bool:
        """Logs in; in an instance without users makes the account its first one, then returns True."""
        new = not properties.get("has-user-setup") and bool(properties.get("setup-token"))
        if new:
            user = {"first_name": "Perpcast", "last_name": "Administrator"}
            person = {**user, "email": account.email, "password": account.password}
            path, body = "/api/setup", {"token": properties["setup-token"], "user": person}
            body |= {"prefs": {"site_name": "Perpcast", "allow_tracking": False}}
        else:
            path, body = "/api/session", {"username": account.email, "password": account.password}
        try:
            self._session = part(self.post(path, body), "id")
        except MetabaseError as error:
            if error.status is None or error.status >= 500:
                raise
            does = "does not accept the first user" if new else "refuses the login of"
            raise SetupError(
                f"Metabase at {self.url} {does} {account.email}: {_reason(error.body)}; check METABASE_ADMIN_EMAIL and "
                "METABASE_ADMIN_PASSWORD in metabase/.env (a forgotten password: docs/metabase.md)"
            ) from None
        # Before anything is listed: it also makes the account's own collection, without which some versions cannot.
        if not part(self.get("/api/user/current"), "is_superuser"):
            raise SetupError(
                f"{account.email} is not an administrator of Metabase at {self.url}; name one in metabase/.env "
                "(METABASE_ADMIN_EMAIL, METABASE_ADMIN_PASSWORD)"
            )
        return new

    def _look(self) -> tuple[dict[str, Any] | None, str]:
        """The public properties, or None and why there are none yet. Raises OtherProgramError."""
        try:
            health = self._ask("GET", "/api/health", seconds=_HEALTH_SECONDS)
            properties = self._ask("GET", "/api/session/properties", seconds=_HEALTH_SECONDS)
        except UnreachableError:
            return None, "nothing listens there yet"
        except MetabaseError as error:
            if error.status is None:
                return None, "it does not answer yet"
            if error.status < 500:
                raise self._other() from None
            return None, _progress(error)
        if not isinstance(health, dict) or "status" not in health or not isinstance(properties, dict):
            raise self._other()
        if "has-user-setup" not in properties and "setup-token" not in properties:
            raise self._other()
        return properties, ""

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, seconds: float = _ANSWER_SECONDS
    ) -> Any:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._session is not None:
            headers["X-Metabase-Session"] = self._session
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        status, text = self._exchange(request, f"{method} {path}", seconds)
        try:
            answer = json.loads(text) if text else None
        except ValueError:
            if status < 400:
                raise self._other() from None
            answer = text.decode(errors="replace")
        if status >= 400:
            raise MetabaseError(f"{method} {path}: HTTP {status}: {_reason(answer)}", status, answer)
        return answer

    def _exchange(self, request: urllib.request.Request, what: str, seconds: float) -> tuple[int, bytes]:
        try:
            with self._opener.open(request, timeout=seconds) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, _BROKEN_OFF) and not isinstance(cause, ConnectionRefusedError):
                raise MetabaseError(
                    f"{what}: the connection to {self.url} broke off ({cause or type(cause).__name__}); run the same "
                    "command again, it finds what is there already"
                ) from None
            if isinstance(cause, http.client.HTTPException):
                raise self._other() from None
            raise UnreachableError(f"Metabase at {self.url}: {getattr(cause, 'strerror', None) or cause}") from None

    def _other(self) -> OtherProgramError:
        return OtherProgramError(
            f"{self.url} is answered by a program that is not Metabase; stop it, or give the address with --url"
        )


def part(answer: Any, name: str) -> Any:
    """What an answer holds under a name. Raises MetabaseError where it has another shape than this program expects."""
    if not isinstance(answer, dict) or name not in answer:
        received = f"keys {sorted(answer)}" if isinstance(answer, dict) else type(answer).__name__
        raise MetabaseError(
            f"Metabase answered in another shape: expected an object with {name!r}, received {received}; pin an image "
            f"between v0.{TESTED_MAJORS[0]} and v0.{TESTED_MAJORS[-1]} in metabase/.env"
        )
    return answer[name]


def version_of(properties: Mapping[str, Any]) -> str:
    """The version's tag, as v0.63.18.4; a question mark where the instance does not say."""
    version = properties.get("version")
    tag = version.get("tag") if isinstance(version, Mapping) else None
    return str(tag or "?")


def version_warning(tag: str) -> str | None:
    """Why a version needs care, None inside the tested range. `v0.63…` and `v1.63…` are editions of one major, 63."""
    first, last = TESTED_MAJORS[0], TESTED_MAJORS[-1]
    found = re.match(r"v?[01]\.(\d+)", tag)
    if found is None:
        return f"unknown version {tag!r}; this program is written for 0.{first} to 0.{last}, so check what it made"
    if int(found[1]) in TESTED_MAJORS:
        return None
    return f"version {tag} is outside 0.{first} to 0.{last}, for which this program is written; check what it made"


def _progress(error: MetabaseError) -> str:
    """What an instance says that is not up yet."""
    body = error.body if isinstance(error.body, dict) else {}
    progress = body.get("progress")
    if isinstance(progress, int | float):
        return f"{body.get('status', 'starting')}, {progress:.0%}"
    return str(body.get("status") or f"HTTP {error.status}")


def _reason(body: Any) -> str:
    """What Metabase says is wrong, in a line: a text, a message, or messages by field."""
    if isinstance(body, dict):
        errors = body.get("errors")
        fields = [f"{name}: {text}" for name, text in errors.items()] if isinstance(errors, dict) else []
        body = "; ".join(fields) or body.get("message") or body.get("error") or body
    return " ".join(str(body).split())[:300] or "no reason given"
