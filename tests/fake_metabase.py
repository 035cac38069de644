"""A strict stand-in for Metabase's API, over HTTP: what provisioning may rely on, and no more.

Stricter than Metabase in one way: a key that a request may not hold is refused (HTTP 400), where Metabase may drop it.
Like it in the rest that matters: names may be there twice, the first user can be made once, a dashboard's tiles are
replaced as a whole, a session is needed, a sent `entity_id` counts for nothing, passwords are not read back. Questions
run their SQL on the PostgreSQL that the connection names.
"""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import psycopg2

HIDDEN = "**MetabasePass**"
GRID = 24
_LOGIN_TRIES = 10

Body = dict[str, Any]


class RefusalError(Exception):
    """An answer that is not the one asked for."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(body)
        self.status = status
        self.body = body


def needs(holds: object, field: str, complaint: str = "value may not be that") -> None:
    if not holds:
        raise RefusalError(400, {"errors": {field: complaint}})


def closed(body: Any, required: str, optional: str = "", where: str = "body") -> Body:
    """The object itself, where it holds all it has to and nothing else."""
    needs(isinstance(body, dict), where, "value must be a map")
    strange = set(body) - {*required.split(), *optional.split()}
    needs(not strange, where, f"disallowed key: {sorted(strange)}")
    missing = set(required.split()) - set(body)
    needs(not missing, where, f"missing required key: {sorted(missing)}")
    return dict(body)


class FakeMetabase:
    """An instance; `with` starts and ends it. Its knobs may be turned while it runs."""

    def __init__(self) -> None:
        self.tag: str | None = "v0.63.18.4"
        self.starting = 0  # so many questions about its health are answered with 503
        self.break_at: int | None = None  # the connection breaks off at this write, from 1
        self.break_before = False  # then without doing it, else after it is done
        self.on_write: Callable[[int], None] = lambda number: None
        self.reshape: Callable[[str, Any], Any] = lambda path, answer: answer
        self.writes: list[str] = []

        self.users: dict[str, str] = {}
        self.token: str | None = str(uuid4())
        self.sessions: dict[str, str] = {}  # whose it is
        self.ordinary: set[str] = set()  # users who are no administrators
        self.greeted = False  # somebody has asked who he is: only then collections can be listed
        self.failures: Counter[str] = Counter()
        self.databases: dict[int, Body] = {}
        self.collections: dict[int, Body] = {}
        self.cards: dict[int, Body] = {}
        self.dashboards: dict[int, Body] = {}
        self._ids = count(1)
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def living(self, things: Mapping[int, Body]) -> list[Body]:
        return [thing for thing in things.values() if not thing.get("archived")]

    # --- requests ----------------------------------------------------------------------------------------------------

    def handle(self, method: str, target: str, session: str | None, text: bytes) -> tuple[int, Any] | None:
        """Status and body of the answer; None where the connection breaks off."""
        path = urlsplit(target).path
        query = {name: values[-1] for name, values in parse_qs(urlsplit(target).query).items()}
        routes = [(route, re.fullmatch(route.path, path)) for route in _ROUTES if route.method == method]
        route, found = next(((route, found) for route, found in routes if found), (None, None))
        if route is None or found is None:
            return 404, "API endpoint does not exist."
        if not route.public and session not in self.sessions:
            return 401, "Unauthenticated"
        with self._lock:
            if route.writes:
                self.writes.append(f"{method} {path}")
                self.on_write(len(self.writes))
            breaks = route.writes and len(self.writes) == self.break_at
            if breaks and self.break_before:
                return None
            body = json.loads(text) if text else {}
            try:
                status, answer = getattr(self, route.name)(*map(int, found.groups()), body=body, query=query)
            except RefusalError as refusal:
                status, answer = refusal.status, refusal.body
            return None if breaks else (status, self.reshape(path, answer))

    # --- coming up, logging in ---------------------------------------------------------------------------------------

    def health(self, body: Body, query: Body) -> tuple[int, Any]:
        if self.starting > 0:
            self.starting -= 1
            return 503, {"status": "initializing", "progress": 0.3}
        return 200, {"status": "ok"}

    def properties(self, body: Body, query: Body) -> tuple[int, Any]:
        version = {"tag": self.tag} if self.tag else {}
        return 200, {"version": version, "has-user-setup": bool(self.users), "setup-token": self.token}

    def setup(self, body: Body, query: Body) -> tuple[int, Any]:
        closed(body, "token user prefs", "database")
        user = closed(body["user"], "email password", "first_name last_name site_name password_confirm", "user")
        closed(body["prefs"], "site_name", "site_locale allow_tracking", "prefs")
        if self.users:
            raise RefusalError(403, "The /api/setup route can only be used to create the first user.")
        needs(body["token"] == self.token, "token", "Token does not match the setup token.")
        needs(re.fullmatch(r"\S+@\S+\.\S+", user["email"]), "email", "value must be a valid email address.")
        strong = len(user["password"]) >= 6 and re.search(r"\d", user["password"])
        needs(strong, "password", "password is too common.")
        self.users[user["email"]] = user["password"]
        self.token = None
        return 200, self._new_session(user["email"])

    def login(self, body: Body, query: Body) -> tuple[int, Any]:
        closed(body, "username password")
        name = body["username"]
        if self.failures[name] >= _LOGIN_TRIES:
            wait = "Too many attempts! You must wait 15 seconds before trying again."
            raise RefusalError(401, {"errors": {"username": wait}})
        if self.users.get(name) != body["password"]:
            self.failures[name] += 1
            raise RefusalError(401, {"errors": {"password": "did not match stored password"}})
        return 200, self._new_session(name)

    def _new_session(self, email: str) -> Body:
        session = str(uuid4())
        self.sessions[session] = email
        return {"id": session}

    def current_user(self, body: Body, query: Body) -> tuple[int, Any]:
        self.greeted = True
        email = list(self.sessions.values())[-1]
        return 200, {"email": email, "is_superuser": email not in self.ordinary}

    # --- connections -------------------------------------------------------------------------------------------------

    def list_databases(self, body: Body, query: Body) -> tuple[int, Any]:
        return 200, {"data": [_without_password(each) for each in self.databases.values()]}

    def get_database(self, number: int, body: Body, query: Body) -> tuple[int, Any]:
        return 200, _without_password(self._find(self.databases, number))

    def create_database(self, body: Body, query: Body) -> tuple[int, Any]:
        closed(body, "name engine details", "is_full_sync is_on_demand auto_run_queries")
        _check_details(body["details"])
        return 200, _without_password(self._add(self.databases, body))

    def update_database(self, number: int, body: Body, query: Body) -> tuple[int, Any]:
        database = self._find(self.databases, number)
        closed(body, "", "name engine details is_full_sync is_on_demand auto_run_queries description")
        details = {**database["details"], **body.get("details", {})}
        if details["password"] == HIDDEN:
            details["password"] = database["details"]["password"]
        _check_details(details)
        database.update(body, details=details)
        return 200, _without_password(database)

    # --- collections -------------------------------------------------------------------------------------------------

    def list_collections(self, body: Body, query: Body) -> tuple[int, Any]:
        if not self.greeted:
            raise RefusalError(500, "no personal collection")
        return 200, [{"id": "root", "name": "Our analytics"}, *self.living(self.collections)]

    def create_collection(self, body: Body, query: Body) -> tuple[int, Any]:
        closed(body, "name", "description parent_id")
        return 200, self._add(self.collections, body)

    def list_items(self, number: int, body: Body, query: Body) -> tuple[int, Any]:
        self._find(self.collections, number)
        things = {"card": self.cards, "dashboard": self.dashboards}[query["models"]]
        names = ("id", "name", "description", "entity_id", "archived")
        found = [
            {name: thing.get(name) for name in names}
            for thing in self.living(things)
            if thing.get("collection_id") == number
        ]
        limit, offset = int(query["limit"]), int(query["offset"])
        page = found[offset : offset + limit]
        return 200, {"data": page, "total": len(found), "limit": limit, "offset": offset}

    # --- questions ---------------------------------------------------------------------------------------------------

    def create_card(self, body: Body, query: Body) -> tuple[int, Any]:
        closed(body, "name dataset_query display visualization_settings", f"{_CARD} entity_id")
        self._check_card(body)
        return 200, self._add(self.cards, {**body, "entity_id": uuid4().hex[:21]})

    def get_card(self, number: int, body: Body, query: Body) -> tuple[int, Any]:
        return 200, self._find(self.cards, number)

    def update_card(self, number: int, body: Body, query: Body) -> tuple[int, Any]:
        card = self._find(self.cards, number)
        closed(body, "", f"name dataset_query display visualization_settings archived {_CARD}")
        self._check_card({**card, **body})
        card.update(body)
        return 200, card

    def _check_card(self, card: Body) -> None:
        needs(card["name"].strip(), "name", "value must be a non-blank string.")
        needs(card.get("description", "-"), "description", "value must be a non-blank string.")
        needs(card["display"] in _DISPLAYS, "display")
        needs(isinstance(card["visualization_settings"], dict), "visualization_settings")
        needs(card.get("collection_id") in (None, *self.collections), "collection_id", "no such collection")
        query = closed(card["dataset_query"], "type database native", where="dataset_query")
        needs(query["type"] == "native" and query["database"] in self.databases, "dataset_query")
        native = closed(query["native"], "query template-tags", where="native")
        tags = native["template-tags"]
        named = set(re.findall(r"{{\s*(\w+)\s*}}", native["query"]))
        needs(named == set(tags), "template-tags", f"the SQL names {sorted(named)}")
        for name, tag in tags.items():
            closed(tag, "id name display-name type", "default required", "template-tags")
            needs(tag["name"] == name and tag["type"] in ("text", "number", "date"), "template-tags")
            UUID(tag["id"])

    def query_card(self, number: int, body: Body, query: Body) -> tuple[int, Any]:
        closed(body, "", "parameters ignore_cache dashboard_id collection_preview")
        card = self._find(self.cards, number)
        for parameter in body.get("parameters") or []:
            closed(parameter, "type target value", "id", "parameters")
        values = {parameter["target"][1][1]: parameter["value"] for parameter in body.get("parameters") or []}
        return 202, self._run(card["dataset_query"], values)

    def query_dataset(self, body: Body, query: Body) -> tuple[int, Any]:
        closed(body, "type database native", "parameters")
        return 202, self._run(body, {})

    def _run(self, query: Body, values: Mapping[str, Any]) -> Body:
        details = self.databases[query["database"]]["details"]
        native = query["native"]
        try:
            sql = substituted(native["query"], native["template-tags"], values)
            connection = _connect(details)
            try:
                with connection.cursor() as cursor:
                    cursor.execute(sql)
                    columns = [{"name": column.name} for column in cursor.description or ()]
                    rows = json.loads(json.dumps(cursor.fetchmany(2000), default=str))
            finally:
                connection.close()
        except (psycopg2.Error, ValueError) as error:
            return {"status": "failed", "error": str(error), "data": {"cols": [], "rows": []}}
        return {"status": "completed", "data": {"cols": columns, "rows": rows}, "row_count": len(rows)}

    # --- dashboards --------------------------------------------------------------------------------------------------

    def create_dashboard(self, body: Body, query: Body) -> tuple[int, Any]:
        closed(body, "name", "description parameters collection_id collection_position cache_ttl")
        empty: Body = {"parameters": [], "dashcards": [], "tabs": [], "width": "fixed"}
        return 200, self._add(self.dashboards, {**empty, **body})

    def get_dashboard(self, number: int, body: Body, query: Body) -> tuple[int, Any]:
        dashboard = self._find(self.dashboards, number)
        shown = [
            tile for tile in dashboard["dashcards"] if not self.cards.get(tile["card_id"] or 0, {}).get("archived")
        ]
        return 200, {**dashboard, "dashcards": shown}

    def update_dashboard(self, number: int, body: Body, query: Body) -> tuple[int, Any]:
        dashboard = self._find(self.dashboards, number)
        closed(body, "", "name description parameters dashcards tabs width auto_apply_filters archived collection_id")
        needs(body.get("width", "full") in ("full", "fixed"), "width")
        for parameter in body.get("parameters", []):
            _check_parameter(parameter)
        if "dashcards" in body:
            declared = {parameter["id"] for parameter in {**dashboard, **body}["parameters"]}
            body["dashcards"] = self._replaced(dashboard["dashcards"], body["dashcards"], declared)
            body.setdefault("tabs", [])  # tiles without tabs end the tabs
        dashboard.update(body)
        return 200, dashboard

    def _replaced(self, present: list[Body], sent: list[Body], declared: set[str]) -> list[Body]:
        """The tiles as sent, all of them: known numbers are kept, others made anew, what is not sent is gone."""
        known = {tile["id"] for tile in present}
        needs(len({tile.get("id") for tile in sent}) == len(sent), "dashcards", "ids must be unique")
        for tile in sent:
            optional = "card_id dashboard_tab_id parameter_mappings visualization_settings series inline_parameters"
            closed(tile, "id row col size_x size_y", f"{optional} action_id", "dashcards")
            needs(tile["row"] >= 0 and tile["col"] >= 0 and tile["size_x"] > 0 and tile["size_y"] > 0, "dashcards")
            needs(tile["col"] + tile["size_x"] <= GRID, "dashcards")
            card = self.cards.get(tile.get("card_id") or 0)
            needs(tile.get("card_id") is None or (card and not card.get("archived")), "card_id", "not found")
            needs(card or "virtual_card" in tile.get("visualization_settings", {}), "card_id", "a blank tile")
            for mapping in tile.get("parameter_mappings", []):
                needs(card is not None, "parameter_mappings", "a tile without a question takes no filter")
                assert card is not None
                closed(mapping, "parameter_id target card_id", where="parameter_mappings")
                kind, (what, tag) = mapping["target"]
                needs((kind, what) == ("variable", "template-tag"), "target")
                needs(mapping["parameter_id"] in declared, "parameter_id", "not a filter of this dashboard")
                needs(tag in card["dataset_query"]["native"]["template-tags"], "target", f"no tag {tag}")
        return [
            {"card_id": None, **tile, "id": tile["id"] if tile["id"] in known else next(self._ids)} for tile in sent
        ]

    def query_tile(self, number: int, tile: int, card: int, body: Body, query: Body) -> tuple[int, Any]:
        closed(body, "", "parameters ignore_cache dashboard_load_id")
        dashboard = self._find(self.dashboards, number)
        kinds = {parameter["id"]: parameter["type"] for parameter in dashboard["parameters"]}
        shown = [each for each in dashboard["dashcards"] if (each["id"], each["card_id"]) == (tile, card)]
        if not shown:
            raise RefusalError(404, "Not found.")
        targets = {mapping["parameter_id"]: mapping["target"][1][1] for mapping in shown[0]["parameter_mappings"]}
        values = {}
        for parameter in body.get("parameters", []):
            closed(parameter, "id type value", "target", "parameters")
            needs(kinds.get(parameter["id"]) == parameter["type"], "parameters", "not a filter of this dashboard")
            if parameter["id"] in targets:
                values[targets[parameter["id"]]] = parameter["value"]
        return 202, self._run(self.cards[card]["dataset_query"], values)

    # --- things ------------------------------------------------------------------------------------------------------

    def _add(self, things: dict[int, Body], thing: Body) -> Body:
        number = next(self._ids)
        things[number] = {**thing, "id": number, "archived": False}
        return things[number]

    def _find(self, things: dict[int, Body], number: int) -> Body:
        if number not in things:
            raise RefusalError(404, "Not found.")
        return things[number]


def substituted(sql: str, tags: Mapping[str, Body], values: Mapping[str, Any]) -> str:
    """A question's SQL as Metabase writes it: optional clauses kept or dropped, each value a literal of its type."""
    literals = {}
    for name, value in values.items():
        if isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"{name} takes one value")
            value = value[0]
        if value is not None:
            literals[name] = _literal(tags[name]["type"], value)

    def clause(found: re.Match[str]) -> str:
        return found[1] if set(re.findall(r"{{\s*(\w+)\s*}}", found[1])) <= set(literals) else ""

    def value_of(found: re.Match[str]) -> str:
        if found[1] not in literals:
            raise ValueError(f"missing required parameter {found[1]}")
        return literals[found[1]]

    return re.sub(r"{{\s*(\w+)\s*}}", value_of, re.sub(r"\[\[(.*?)\]\]", clause, sql, flags=re.DOTALL))


def _literal(kind: str, value: Any) -> str:
    if kind == "number":
        return str(float(value))
    quoted = "'" + str(value).replace("'", "''") + "'"
    return f"date {quoted}" if kind == "date" else f"CAST({quoted} AS varchar)"


def _connect(details: Body) -> Any:
    names = ("host", "port", "dbname", "user", "password")
    return psycopg2.connect(**{name: details[name] for name in names}, connect_timeout=10)


def _check_details(details: Body) -> None:
    closed(details, "host port dbname user password", "ssl", "details")
    try:
        _connect(details).close()
    except psycopg2.OperationalError as error:
        raise RefusalError(400, {"errors": {"password": str(error)}, "message": "connection failed"}) from None


def _without_password(database: Body) -> Body:
    return {**database, "details": {**database["details"], "password": HIDDEN}}


def _check_parameter(parameter: Body) -> None:
    sources = "values_source_type values_source_config values_query_type"
    closed(parameter, "id name slug type", f"sectionId default isMultiSelect {sources}", "parameters")
    needs(parameter["type"] in ("string/=", "number/=", "date/single"), "parameters", "unknown type")
    if parameter.get("values_source_type"):
        needs(parameter["values_source_type"] == "static-list", "parameters")
        values = closed(parameter["values_source_config"], "values")["values"]
        needs(
            values and all(isinstance(value, list) and len(value) == 1 for value in values), "parameters", "no values"
        )


_CARD = "type description parameters parameter_mappings collection_id collection_position result_metadata cache_ttl"
_DISPLAYS = (
    *("table", "line", "bar", "area", "combo", "scatter", "row", "pie", "funnel", "gauge", "progress", "scalar"),
    *("smartscalar", "waterfall", "map", "sankey", "object", "boxplot"),
)


class _Route(NamedTuple):
    """Who answers a request, whether without a session, and whether it counts as a write."""

    method: str
    path: str
    name: str
    public: bool = False
    writes: bool = False


_ROUTES = (
    _Route("GET", "/api/health", "health", public=True),
    _Route("GET", "/api/session/properties", "properties", public=True),
    _Route("POST", "/api/setup", "setup", public=True, writes=True),
    _Route("POST", "/api/session", "login", public=True),
    _Route("GET", "/api/user/current", "current_user"),
    _Route("GET", "/api/database", "list_databases"),
    _Route("GET", r"/api/database/(\d+)", "get_database"),
    _Route("POST", "/api/database", "create_database", writes=True),
    _Route("PUT", r"/api/database/(\d+)", "update_database", writes=True),
    _Route("POST", "/api/dataset", "query_dataset"),
    _Route("GET", "/api/collection", "list_collections"),
    _Route("POST", "/api/collection", "create_collection", writes=True),
    _Route("GET", r"/api/collection/(\d+)/items", "list_items"),
    _Route("POST", "/api/card", "create_card", writes=True),
    _Route("GET", r"/api/card/(\d+)", "get_card"),
    _Route("PUT", r"/api/card/(\d+)", "update_card", writes=True),
    _Route("POST", r"/api/card/(\d+)/query", "query_card"),
    _Route("POST", "/api/dashboard", "create_dashboard", writes=True),
    _Route("GET", r"/api/dashboard/(\d+)", "get_dashboard"),
    _Route("PUT", r"/api/dashboard/(\d+)", "update_dashboard", writes=True),
    _Route("POST", r"/api/dashboard/(\d+)/dashcard/(\d+)/card/(\d+)/query", "query_tile"),
)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, metabase: FakeMetabase) -> None:
        self.metabase = metabase
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def _answer(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        result = self.server.metabase.handle(self.command, self.path, self.headers.get("X-Metabase-Session"), text)
        if result is None:
            self.close_connection = True
            return
        status, answer = result
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests have output of their own."""
