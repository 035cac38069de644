"""A training on a machine elsewhere, from an offer to the files at home: start, send, set up, check, train, fetch.

Every step can be done again: a second command after a killed one goes through the same steps.
"""

import json
import secrets
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from perpcast.command_line import connect_database, notice
from perpcast.config import Settings
from perpcast.database import grant_reader, revoke_reader
from perpcast.errors import PerpcastError, SetupError
from train_universal_transformer import code_revision
from vast.home import TUNNEL_TABLES, Prepared
from vast.machine import (
    HOST_KEY_REFUSED,
    NOT_CONNECTED,
    Child,
    Deadline,
    HostKeyError,
    LostError,
    Machine,
    MachineError,
    Route,
    host_key_in,
    make_key,
    write_ssh_config,
)
from vast.offers import Instance, VastError, attach_key, list_instances, read_log
from vast.rental import HOUR, Ledger, Rental

# Home stops before the instance ends itself, so that there is time to fetch: so long, or this share of its hours.
FAREWELL_SECONDS, FAREWELL_SHARE = 180.0, 0.1
FETCH_SECONDS = 60.0  # for the last copy of checkpoint and history after a failure
TUNNEL_PORT = 15555  # there; 5555 may be that of a server of its own
PASSWORD_FILE = ".perpcast/pgpass"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DATABASE_TRIES = 3
_DEAD = ("exited", "offline", "unknown", "stopped")
_SETUP_LOCK = (
    "mkdir -p .perpcast && if command -v flock >/dev/null; then exec flock .perpcast/setup.lock sh -c {0}; "
    "else exec sh -c {0}; fi"
)


class StartError(PerpcastError):
    """A rented machine that cannot be used: another one may."""


@dataclass(frozen=True)
class Job:
    """What is to be trained, and how its data travels: `rsync` or `tunnel`."""

    settings: Settings
    prepared: Prepared
    task: str
    data: str

    @property
    def home(self) -> Path:
        """Where datasets/, logs/, plots/ and trained_model/ lie here."""
        return self.settings.path()

    @property
    def dataset_gb(self) -> float:
        """What is sent, in GB of 10^9 bytes."""
        folder = self.settings.path("datasets", self.prepared.dataset.dataset_id)
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def start(ledger: Ledger, settings: Settings, rental: Rental) -> Machine:
    """Waits until the rented machine runs and answers with the key that it printed. Raises StartError."""
    vast = settings.vast
    until = time.time() + vast.start_minutes * 60
    public_key = make_key(ledger.folder)
    attached, reason, pauses = False, "it is being made", _pauses()
    while time.time() < until:
        try:
            instance = _listed(rental)
            rental = _priced(ledger, rental, instance)
            reason = f"it is {instance.status or 'being made'} {instance.message}".strip()
            attached = attached or _attach(instance, public_key)
            if instance.status == "running" and instance.address is not None:
                host_key = rental.host_key or host_key_in(read_log(instance.instance_id))
                reason = "it runs, but its log does not say its host key"
                if host_key is not None:
                    route = write_ssh_config(ledger.folder, rental.label, host_key, instance.address, vast.folder)
                    machine = Machine(route, home_deadline(rental), vast.lost_minutes * 60)
                    reason = "it runs, but lets nobody in over SSH"
                    if machine.check_host():
                        ledger.change(host_key=host_key)
                        return machine
                    attached = False
        except VastError as error:  # out of reach for a moment: no reason to give up
            reason = str(error)
        except HostKeyError as error:
            # The key may be made anew while a machine comes up, and the log, which is what counts, will say so.
            if rental.host_key is not None:
                raise
            reason = str(error)
        time.sleep(next(pauses))
    raise StartError(f"instance {rental.instance_id} did not start within {vast.start_minutes:g} minutes: {reason}")


def home_deadline(rental: Rental) -> Deadline:
    """When home stops: a little before the instance ends itself."""
    span = rental.deadline - rental.created_at
    at = rental.deadline - min(FAREWELL_SECONDS, FAREWELL_SHARE * span)
    return Deadline(at, f"the time for {span / HOUR * rental.price:.2f} USD, {span / HOUR:.3g} hours,")


def _priced(ledger: Ledger, rental: Rental, instance: Instance) -> Rental:
    """The rental at what Vast charges for it, where that is more than the offer said: the cap of cost holds."""
    if instance.price <= rental.price:
        return rental
    dearer = rental.at_price(instance.price)
    tell(f"the instance costs {dearer.price:.3f} USD an hour, offered were {rental.price:.3f}: it has fewer hours")
    ledger.write(dearer)
    return dearer


def _listed(rental: Rental) -> Instance:
    """The instance, on its way to run. Raises StartError where it never will, OutOfTimeError."""
    found = [instance for instance in list_instances() if rental.owns(instance)]
    home_deadline(rental).check()  # first: at the deadline it ends itself
    if not found:
        raise StartError(f"instance {rental.instance_id} is no longer listed by Vast")
    if found[0].status in _DEAD:
        raise StartError(f"instance {rental.instance_id} is {found[0].status} {found[0].message}".strip())
    return found[0]


def _attach(instance: Instance, public_key: str) -> bool:
    try:
        attach_key(instance.instance_id, public_key)
    except VastError:  # not there yet: with the next look
        return False
    return True


def _pauses() -> Iterator[float]:
    yield from (1.0, 1.0, 2.0, 3.0, 5.0)
    while True:
        yield 10.0


def train_there(machine: Machine, job: Job, ledger: Ledger, rental: Rental | None) -> None:
    """Everything between a machine that answers and the model at home, not yet checked.

    Raises StartError where its GPU is of no use, HostKeyError, LostError, OutOfTimeError, MachineError.
    """
    with ExitStack() as stack:
        role = reader_role(ledger) if job.data == "tunnel" else None
        configs = stack.enter_context(_configs(job, role))
        if rental is None or not rental.training:
            send(machine, job, configs)
        tunnel = None
        if role is not None:
            _write_password(machine, job, ledger, rental, role)
            tunnel = stack.enter_context(_tunnel(machine, job))
        if rental is not None:
            ledger.change(training=True)
        train(machine, job, configs, tunnel)
    fetch(machine, job)


def send(machine: Machine, job: Job, configs: list[Path]) -> None:
    """Code and configuration, what they need, the device's word, then the data and the last checkpoint."""
    vast = job.settings.vast
    named = [part for path in configs for part in ("--config", str(path))]
    _demand(machine.run("sync_to_vast.sh", "--code-only", *named, machine.route.host), "sending the code")
    notice(f"preparing the machine: {vast.setup}")
    _demand(machine.ssh(_SETUP_LOCK.format(shlex.quote(vast.setup))), f"its preparation ({vast.setup})")
    if machine.ssh(f".venv/bin/python -m vast.self_check --device {vast.device}"):
        raise StartError(f"the {vast.device} of this machine is of no use to TensorFlow: see above")
    folders = ["--dataset", job.prepared.dataset.dataset_id] if job.data == "rsync" else ["--code-only"]
    if (job.home / "logs" / f"training_{job.prepared.model_id}").is_dir():
        folders += ["--run", job.prepared.model_id]
    sent = machine.run("sync_to_vast.sh", *folders, *named, "--from", str(job.home), machine.route.host)
    _demand(sent, "sending the dataset")


def train(machine: Machine, job: Job, configs: list[Path], tunnel: "Tunnel | None") -> None:
    """Trains in a session there, its output here; copies checkpoint and history home meanwhile."""
    copies = Copies(machine, job)
    command = ["env", f"PGPASSFILE={machine.route.folder}/{PASSWORD_FILE}"] if tunnel else []
    source = ["--database"] if tunnel else ["--dataset", job.prepared.dataset.dataset_id]
    command += [".venv/bin/python", "-m", "vast.remote", "--task", job.task, *source]
    command += ["--model", job.prepared.model_id]
    if revision := code_revision():
        command += ["--revision", revision]
    for number, _ in enumerate(configs):
        command += ["--config", "config.yaml" if number == 0 else f"config.{number}.yaml"]

    def meanwhile() -> None:
        copies.look()
        if tunnel is not None:
            tunnel.look()

    try:
        for tries_left in reversed(range(DATABASE_TRIES if tunnel else 1)):
            if tunnel is not None:
                tunnel.wait_open()
            lost = f"{machine.lost_seconds / 60:g}"
            options = ["--lost-minutes", lost, machine.route.host, "--", *command]
            code = machine.run("run_training_on_vast.sh", *options, meanwhile=meanwhile)
            if code != SetupError.exit_code or not tries_left:  # not a database that could not be reached
                break
    finally:
        copies.stop()
    _demand(code, "the training")


def fetch(machine: Machine, job: Job) -> None:
    """Brings everything that a training makes."""
    fetched = machine.run("fetch_from_vast.sh", "--into", str(job.home), job.prepared.model_id, machine.route.host)
    _demand(fetched, "fetching the model")


def fetch_last(route: Route, home: Path, model_id: str) -> None:
    """Brings checkpoint and history after a failure, within a minute; whatever prevents it is only told."""
    machine = Machine(route, Deadline(time.time() + FETCH_SECONDS, "the time for a last copy"), 0.0)
    options = ("--logs-only", "--into", str(home), model_id, route.host)
    try:
        _demand(machine.run("fetch_from_vast.sh", *options), "the last copy of checkpoint and history")
    except (PerpcastError, OSError) as error:
        tell(str(error))


def tell(text: str) -> None:
    """A line for the reader, who may be gone: that must not stop the way out."""
    with suppress(OSError, ValueError):
        print(f"note: {text}", flush=True)


class Copies:
    """Checkpoint and history, copied home every `fetch_minutes` beside the training."""

    def __init__(self, machine: Machine, job: Job) -> None:
        self._command = machine.script(
            "fetch_from_vast.sh", "--logs-only", "--into", str(job.home), job.prepared.model_id, machine.route.host
        )
        self._seconds = job.settings.vast.fetch_minutes * 60
        self._next = time.monotonic() + self._seconds
        self._child: Child | None = None

    def look(self) -> None:
        """Begins a copy where it is time, and ends the one before."""
        if self._child is not None and self._child.poll() is not None:
            self.stop()
        if self._child is None and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._seconds
            self._child = Child(self._command, quiet=True)  # a failure is of no account: the next copy follows

    def stop(self) -> None:
        """Ends a copy that is under way."""
        if self._child is not None:
            self._child.stop()
            self._child = None


class Tunnel:
    """The reverse tunnel to the database here, kept open by its script."""

    def __init__(self, machine: Machine, local_port: int, log: Path) -> None:
        ports = ["-r", str(TUNNEL_PORT), "-l", str(local_port)]
        self._machine, self._log = machine, log
        self._command = machine.script("setup_remote_db_tunnel.sh", *ports, machine.route.host)
        self._child = Child(self._command, output=log)

    def look(self) -> int | None:
        """Begins anew where the script ended, and returns its exit code then. Raises HostKeyError."""
        code = self._child.poll()
        if code == HOST_KEY_REFUSED:
            raise HostKeyError(f"the tunnel to {self._machine.route.host} was refused: see above; nothing was sent")
        if code is not None:
            self._child.stop()
            time.sleep(1)
            self._child = Child(self._command, output=self._log)
        return code

    def wait_open(self) -> None:
        """Waits for the first word that it is open. Raises LostError, MachineError, OutOfTimeError."""
        until = time.monotonic() + self._machine.lost_seconds
        while "tunnel: open" not in self._log.read_text(encoding="utf-8", errors="replace"):
            if time.monotonic() >= until:
                raise LostError(f"the tunnel to {self._machine.route.host} did not open: run the same command again")
            if self._machine.deadline is not None:
                self._machine.deadline.check()
            if self.look() not in (None, NOT_CONNECTED):
                raise MachineError("the tunnel could not be opened: see above")
            time.sleep(0.1)

    def stop(self) -> None:
        """Closes it."""
        self._child.stop()


@contextmanager
def _tunnel(machine: Machine, job: Job) -> Iterator[Tunnel]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "tunnel.log"
        log.touch()
        tunnel = Tunnel(machine, job.settings.database.port, log)
        try:
            yield tunnel
        finally:
            tunnel.stop()


def check_tunnel(settings: Settings) -> None:
    """Raises SetupError where there is nothing on this computer to forward."""
    if settings.database.host not in LOOPBACK:
        raise SetupError(
            f"--data tunnel forwards a database of this computer, and database.host is {settings.database.host}: "
            "send the dataset instead (--data rsync)"
        )


def reader_role(ledger: Ledger) -> str:
    """The database role that a machine of this clone is given."""
    return f"perpcast_gpu_{ledger.prefix.split('-')[1]}"


def revoke(settings: Settings, role: str) -> None:
    """Takes the role away again; where the database cannot be asked, says until when it is valid."""
    try:
        with connect_database(settings) as database:
            revoke_reader(database, role)
    except (PerpcastError, OSError) as error:
        tell(f"the database role {role} could not be removed ({error}); it may read until its time is up, then no more")


def _write_password(machine: Machine, job: Job, ledger: Ledger, rental: Rental | None, role: str) -> None:
    """Makes the role, and lays its password where only the training there can read it; once for each machine."""
    if rental is not None and rental.role_ready:
        return
    until = time.time() + job.settings.vast.max_hours * HOUR if rental is None else rental.deadline
    password = secrets.token_urlsafe(24)
    with connect_database(job.settings) as database:
        grant_reader(database, role, password, TUNNEL_TABLES, until=datetime.fromtimestamp(until, UTC))
    _demand(machine.ssh("mkdir -p .perpcast"), "making .perpcast there")
    machine.send_secret(f"127.0.0.1:{TUNNEL_PORT}:*:{role}:{password}\n", PASSWORD_FILE)
    if rental is not None:
        ledger.change(role_ready=True)


@contextmanager
def _configs(job: Job, role: str | None) -> Iterator[list[Path]]:
    """The configuration files for the machine; over the tunnel one more, which says where the database is there."""
    configs = list(job.settings.files)
    if role is None:
        yield configs
        return
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder) / "database.yaml"
        values = {"database": {"host": "127.0.0.1", "port": TUNNEL_PORT, "user": role}}
        overlay.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
        yield [*configs, overlay]


def _demand(code: int, what: str) -> None:
    if code:
        raise MachineError(f"{what} failed with exit code {code}: see above")
