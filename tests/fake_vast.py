"""Vast.ai in a folder: a strict `vastai` for PATH whose instances are machines of tests/ssh_world.py, and the HTTP
endpoint that an instance destroys itself by.

Its ways are those seen of the real client, version 1.9.1: a refusal is JSON on stderr with exit code 0, `destroy
instance` prints nothing, `logs` prints text. Stricter than that one: an unknown field in a query is wrong use too.
"""

import argparse
import fcntl
import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
API_KEY, CONTAINER_KEY = "key-of-the-account", "key-of-the-container"
OFFER = {
    "machine_id": 9001,
    "gpu_name": "RTX 4090",
    "num_gpus": 1,
    "dph_total": 0.36,
    "cuda_max_good": 12.8,
    "reliability2": 0.995,
    "disk_space": 500.0,
    "inet_up_cost": 0.01,
    "inet_down_cost": 0.005,
    "duration": 30 * 86400.0,
    "direct_port_count": 8,
    "compute_cap": 890,
    "rentable": True,
    "verified": True,
    "external": False,
    "geolocation": "Sweden, SE",
}
_ALIASES = {"cuda_vers": "cuda_max_good", "dph": "dph_total", "reliability": "reliability2"}
_UNITS = {"duration": 86400.0}
_TESTS = {
    "=": lambda found, wanted: found == wanted,
    "<=": lambda found, wanted: found <= wanted,
    ">=": lambda found, wanted: found >= wanted,
    "<": lambda found, wanted: found < wanted,
    ">": lambda found, wanted: found > wanted,
}


class RefusedError(Exception):
    """The server says no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeVast:
    """The whole of it, in a folder: used by a test and by its own executable, in processes of their own.

    Knobs in the state: `statuses` of a new instance, one for each time that the instances are listed, the last one
    for good; `refuse`, a list of [command, status, how often]; `lose_answer`: the next creation is carried out, its
    answer never comes; `answer_after`: seconds that a creation's answer takes; `impostor`: who answers over SSH has
    not the key that the instance prints; `disk`: the folder that is gone with an instance.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state, self.bin = folder / "state.json", folder / "bin"

    def make(self, disk: Path, url: str) -> None:
        """An account with one offer."""
        self.bin.mkdir(parents=True)
        offers = [{**OFFER, "id": 101}]
        state = {"offers": offers, "instances": {}, "asked": [], "next": 7001, "disk": str(disk), "url": url}
        self._write({**state, "statuses": ["running"], "refuse": [], "impostor": False})
        program = self.bin / "vastai"
        code = (
            "import sys; sys.path.insert(0, sys.argv.pop(1)); from tests.fake_vast import main; main(sys.argv.pop(1))"
        )
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" {ROOT} {self.folder} "$@"\n')
        program.chmod(0o755)
        # A real instance has root; here it is whoever runs the tests.
        ssh = self.bin / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -l {getpass.getuser()} "$@"\n')
        ssh.chmod(0o755)

    @contextmanager
    def state(self) -> Iterator[dict[str, Any]]:
        """To look at and to change, while nobody else does."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = json.loads(self._state.read_text())
            yield state
            self._write(state)

    def _write(self, state: Mapping[str, Any]) -> None:
        part = self._state.with_suffix(".part")
        part.write_text(json.dumps(state, indent=1))
        os.replace(part, self._state)

    def turn(self, **knobs: Any) -> None:
        """Sets knobs."""
        with self.state() as state:
            state.update(knobs)

    @property
    def instances(self) -> list[dict[str, Any]]:
        """Those that exist, as they stand in the account."""
        with self.state() as state:
            return list(state["instances"].values())

    @property
    def asked(self) -> list[str]:
        """Every command that was asked, without its options."""
        with self.state() as state:
            return list(state["asked"])

    def machine(self, number: int | str) -> Any:
        """The machine behind an instance, also behind one that is gone."""
        from tests.ssh_world import SshMachine

        return SshMachine(self.folder / f"instance_{number}")

    def answer(self, arguments: Sequence[str], key: str) -> str:
        """What the client prints. Raises RefusedError; wrong use ends the process."""
        command, options = _parse(arguments)
        with self.state() as state:
            state["asked"].append(command)
            if key != API_KEY:
                raise RefusedError(401, "Invalid user key")
            for rule in state["refuse"]:
                if rule[0] == command and rule[2] > 0:
                    rule[2] -= 1
                    self._write(state)
                    raise RefusedError(rule[1], "as the test wishes")
        return getattr(self, "_" + command.replace(" ", "_"))(options)

    def _search_offers(self, options: argparse.Namespace) -> str:
        with self.state() as state:
            found = [offer for offer in state["offers"] if _matches(offer, " ".join(options.query))]
        return json.dumps(sorted(found, key=lambda offer: offer[options.order])[: options.limit])

    def _create_instance(self, options: argparse.Namespace) -> str:
        if len(options.onstart_cmd.encode()) > 16_384:
            raise RefusedError(400, "onstart is too long")
        with self.state() as state:
            offer = next((offer for offer in state["offers"] if offer["id"] == options.id), None)
            if offer is None:
                raise RefusedError(
                    404, f"error 404/3603: no_such_ask Instance type by id {options.id} is not available."
                )
            state["offers"].remove(offer)
            number = state["next"]
            state["next"] += 1
            instance = {key: offer[key] for key in ("machine_id", "gpu_name", "num_gpus", "dph_total", "geolocation")}
            instance |= {"id": number, "label": options.label, "start_date": time.time(), "status_msg": None}
            instance |= {"image": options.image, "disk": options.disk, "statuses": list(state["statuses"])}
            state["instances"][str(number)] = instance
            late, lost = state.pop("answer_after", 0), state.pop("lose_answer", False)
            url, impostor = state["url"], state["impostor"]
        self._boot(number, options.onstart_cmd, url)
        if impostor:
            self.machine(number).change_host_key()
        time.sleep(late)
        if lost:
            raise ConnectionError("Connection aborted.")
        return json.dumps({"success": True, "new_contract": number})

    def _boot(self, number: int, onstart: str, url: str) -> None:
        """Starts the machine, and on it what it was told to run; there /etc/ssh is a folder of its own."""
        machine = self.machine(number)
        machine.authorized_keys.write_text("")
        machine.start()
        keys = machine.folder / "keys_at_boot"
        shutil.copytree(machine.ssh_keys, keys)
        own = {"CONTAINER_ID": str(number), "CONTAINER_API_KEY": CONTAINER_KEY, "VAST_URL": url}
        with (machine.folder / "container.log").open("wb") as log:
            subprocess.run(
                ["sh", "-c", 'sh -c "$1" &', "container", onstart.replace("/etc/ssh/", f"{keys}/")],
                env={**machine.environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=True,
            )

    def _show_instances(self, options: argparse.Namespace) -> str:
        with self.state() as state:
            return json.dumps([self._row(instance) for instance in state["instances"].values()])

    def _row(self, instance: dict[str, Any]) -> dict[str, Any]:
        statuses = instance["statuses"]
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        port = int((self.folder / f"instance_{instance['id']}" / "port").read_text())
        reached = {"public_ipaddr": "127.0.0.1 ", "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(port)}]}}
        hidden = ("statuses", "image", "disk")
        row = {key: value for key, value in instance.items() if key not in hidden}
        return {**row, "actual_status": status, **(reached if status == "running" else {"ports": None})}

    def _destroy_instance(self, options: argparse.Namespace) -> str:
        assert options.yes, "the real client would ask, and wait for ever"
        self.destroy(options.id)
        return ""

    def destroy(self, number: int) -> None:
        """The machine and everything on its disk are gone."""
        with self.state() as state:
            if state["instances"].pop(str(number), None) is None:
                raise RefusedError(404, f"no such instance {number}")
            disk = Path(state["disk"])
        self.machine(number).power_off()
        shutil.rmtree(disk, ignore_errors=True)

    def _attach_ssh(self, options: argparse.Namespace) -> str:
        assert options.ssh_key.startswith("ssh-ed25519 ")
        with self.state() as state:
            if str(options.instance_id) not in state["instances"]:
                raise RefusedError(404, "no such instance")
        keys = self.machine(options.instance_id).authorized_keys
        keys.write_text(f"{keys.read_text()}{options.ssh_key}\n")
        return str({"success": True})

    def _logs(self, options: argparse.Namespace) -> str:
        log = self.folder / f"instance_{options.INSTANCE_ID}" / "container.log"
        return "\n".join(log.read_text().splitlines()[-int(options.tail) :])


class SelfDestruction(ThreadingHTTPServer):
    """Takes the DELETE of an instance that ends itself."""

    daemon_threads = True

    def __init__(self, vast: FakeVast) -> None:
        self.vast = vast
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: SelfDestruction

    def do_DELETE(self) -> None:
        found = re.fullmatch(r"/api/v0/instances/(\d+)/", self.path)
        status = 200 if found and self.headers["Authorization"] == f"Bearer {CONTAINER_KEY}" else 401
        answer = b'{"success": true}' if status == 200 else b'{"success": false}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        if found and status == 200:  # whoever asked is killed by it
            self.server.vast.destroy(int(found[1]))

    def log_message(self, format: str, *args: object) -> None:
        pass


def _parse(arguments: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """`vastai` joins verb and object before it parses."""
    words = list(arguments)
    command = words[0] if words[:1] == ["logs"] else " ".join(words[:2])
    parser = argparse.ArgumentParser(prog="vastai", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, *flags: tuple[str, Any]) -> None:
        each = commands.add_parser(name, allow_abbrev=False)
        each.add_argument("--raw", action="store_true", required=True)
        for flag, kind in flags:
            if flag.startswith("--") and kind is not bool:
                each.add_argument(flag, type=kind, required=True)
            elif kind is bool:
                each.add_argument(flag, action="store_true")
            else:
                each.add_argument(flag, type=kind)

    add("search offers", ("--order", str), ("--storage", float), ("--limit", int))
    commands.choices["search offers"].add_argument("query", nargs="+")
    add(
        "create instance",
        *(("id", int), ("--image", str), ("--disk", float), ("--ssh", bool), ("--direct", bool), ("--label", str)),
        *(("--onstart-cmd", str), ("--cancel-unavail", bool)),
    )
    add("show instances")
    add("destroy instance", ("id", int), ("--yes", bool))
    add("attach ssh", ("instance_id", int), ("ssh_key", str))
    add("logs", ("INSTANCE_ID", int), ("--tail", str))
    return command, parser.parse_args([command, *words[len(command.split()) :]])


def _matches(offer: Mapping[str, Any], query: str) -> bool:
    """Every comparison of the query holds."""
    return all(_holds(offer, word) for word in query.split())


def _holds(offer: Mapping[str, Any], word: str) -> bool:
    split = re.fullmatch(r"([a-z_]+)(<=|>=|=|<|>)(.+)", word)
    if split is None or _ALIASES.get(split[1], split[1]) not in OFFER:
        print(f"vastai: error: no such field or operator: {word}", file=sys.stderr)
        sys.exit(2)
    name, operator, wanted = _ALIASES.get(split[1], split[1]), split[2], split[3]
    found = offer[name]
    if isinstance(found, bool):
        return found == (wanted == "true")
    if isinstance(found, str):
        return found == wanted.replace("_", " ")
    return _TESTS[operator](found, float(wanted) * _UNITS.get(name, 1))


def main(folder: str) -> None:
    """The executable."""
    try:
        print(FakeVast(Path(folder)).answer(sys.argv[1:], os.environ.get("VAST_API_KEY", "")))
        sys.stdout.flush()
    except RefusedError as refusal:
        print(json.dumps({"error": True, "status_code": refusal.status, "msg": str(refusal)}), file=sys.stderr)
