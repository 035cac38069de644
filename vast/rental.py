"""What is rented, written down before it is true, and the way back: rent, find again, destroy. Owns .perpcast/vast/.

`rental.json` names the one instance that this clone may have, and `history/` those that it had. A label is on disk
before Vast hears of it: whatever is killed in between, the instance can be found by it.
"""

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

from perpcast.config import VastSettings
from perpcast.errors import DataError, PerpcastError, SetupError
from vast.interrupts import held_back
from vast.offers import Instance, Offer, VastError, create_instance, destroy_instance, list_instances

PREFIX = "perpcast-"
ONSTART = Path(__file__).with_name("onstart.sh")
ONSTART_BYTES = 16_384  # more is refused by Vast
HOUR = 3600.0
# How long is tried to destroy an instance, and how long one without an answer may take to appear in the list.
DESTROY_SECONDS, SETTLE_SECONDS = 300.0, 10.0
LOCK_SECONDS = 10.0  # for what a killed command left behind to end


@dataclass(frozen=True)
class Rental:
    """One instance, from before it is asked for until it is gone. Times are seconds of the epoch, prices USD an hour.

    `deadline` is when the instance ends itself. `training` is set before the training begins there, `role_ready` once
    the password of the database role lies there.
    """

    label: str
    model_id: str
    task: str
    data: str
    offer_id: int
    gpu_name: str
    price: float
    created_at: float
    deadline: float
    instance_id: int | None = None
    host_key: str | None = None
    training: bool = False
    role_ready: bool = False
    ended_at: float | None = None

    def hours(self) -> float:
        """From its creation to its end, or to this moment."""
        ended = time.time() if self.ended_at is None else self.ended_at
        return max(ended - self.created_at, 0.0) / HOUR

    def cost(self) -> float:
        """Hours times price, USD; transfer is billed by Vast on top."""
        return self.hours() * self.price

    def at_price(self, price: float) -> "Rental":
        """The same money at another price: a dearer hour leaves fewer of them, a cheaper one no more."""
        if price <= self.price:
            return self
        span = (self.deadline - self.created_at) * self.price / price
        return replace(self, price=price, deadline=self.created_at + span)

    def owns(self, instance: Instance) -> bool:
        """True for the instance that was rented under this label."""
        return instance.label == self.label or instance.instance_id == self.instance_id


@dataclass(frozen=True)
class Purpose:
    """What something is rented for: the model, its task, and how the data travels (`rsync` or `tunnel`)."""

    model_id: str
    task: str
    data: str


class Ledger:
    """The folder with everything about the rentals of one clone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._current, self._history = folder / "rental.json", folder / "history"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One `python -m vast` for each clone. Raises SetupError while another one works.

        The lock is inherited by what is started inside, so that a command after a killed one begins only when the
        last request of that one has been answered or has failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _locked(lock, LOCK_SECONDS):
                raise SetupError(
                    "another python -m vast works for this clone: wait until it ends, or stop it with Ctrl-C (it then "
                    "destroys what it rented)"
                )
            os.set_inheritable(lock, True)
            yield
        finally:
            os.close(lock)

    def is_free(self) -> bool:
        """True where no other `python -m vast` works for this clone at this moment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            return _locked(lock, 0.0)
        finally:
            os.close(lock)

    @property
    def prefix(self) -> str:
        """What the labels of this clone begin with; a copy of the clone has another one."""
        own = self.folder / "clone"
        if not own.exists():
            _write(own, secrets.token_hex(16))
        described = f"{own.read_text(encoding='utf-8')} {self.folder.resolve()}"
        return f"{PREFIX}{hashlib.sha256(described.encode()).hexdigest()[:8]}-"

    def new_label(self) -> str:
        """A label that no instance has had."""
        return f"{self.prefix}{secrets.token_hex(4)}"

    def current(self) -> Rental | None:
        """The rental that may exist at Vast. Raises DataError where the file cannot be read."""
        return _read(self._current) if self._current.exists() else None

    def write(self, rental: Rental) -> None:
        """Makes it the current one, on the disk itself before this returns."""
        _write(self._current, json.dumps(asdict(rental), indent=1))

    def change(self, **changes: object) -> Rental:
        """The current rental with other values, written."""
        current = self.current()
        assert current is not None
        changed = replace(current, **changes)  # type: ignore[arg-type]
        self.write(changed)
        return changed

    def close(self, rental: Rental, ended_at: float) -> None:
        """The instance is gone: moves it to the history. One that never had an instance is forgotten."""
        ended = replace(rental, ended_at=rental.ended_at or ended_at)
        if rental.instance_id is not None:
            _write(self._history / f"{rental.label}.json", json.dumps(asdict(ended), indent=1))
        self._current.unlink(missing_ok=True)

    def past(self, model_id: str) -> list[Rental]:
        """The ended rentals for a model, oldest first."""
        rentals = [_read(path) for path in self._history.glob("*.json")]
        return sorted((one for one in rentals if one.model_id == model_id), key=lambda one: one.created_at)


def rent(ledger: Ledger, vast: VastSettings, offer: Offer, purpose: Purpose, hours: float) -> Rental:
    """Rents the offer for so many hours at most.

    Raises VastError; with a status from 400 to 499 nothing is rented, else `give_back` has to make sure of it.
    """
    now = time.time()
    rental = Rental(
        label=ledger.new_label(),
        model_id=purpose.model_id,
        task=purpose.task,
        data=purpose.data,
        offer_id=offer.offer_id,
        gpu_name=offer.gpu_name,
        price=offer.price,
        created_at=now,
        deadline=now + hours * HOUR,
    )
    onstart = onstart_text(rental.deadline)
    ledger.write(rental)
    with held_back():
        try:
            number = create_instance(offer, vast, rental.label, onstart)
        except VastError as error:
            if 400 <= error.status < 500:
                ledger.close(rental, now)
                raise
            found = find(rental)  # whether the request arrived is unknown
            if found is None:
                raise
            number = found.instance_id
        return ledger.change(instance_id=number)


def stray(instance: Instance) -> Rental:
    """An instance that no file of ours names, as something to give back."""
    return Rental(
        label=instance.label,
        model_id="",
        task="",
        data="",
        offer_id=0,
        gpu_name=instance.gpu_name,
        price=instance.price,
        created_at=instance.started,
        deadline=0.0,
        instance_id=instance.instance_id,
    )


def onstart_text(deadline: float) -> str:
    """What the instance runs when it comes up: it destroys itself at the deadline, and prints its host key."""
    first, rest = ONSTART.read_text(encoding="utf-8").split("\n", 1)  # the first line names the shell
    text = f"{first}\nexport PERPCAST_DEADLINE={int(deadline)}\n{rest}"
    assert len(text.encode()) <= ONSTART_BYTES
    return text


def find(rental: Rental) -> Instance | None:
    """The rental's instance. One whose creation was not answered is looked for during some seconds."""
    until = time.monotonic() + (SETTLE_SECONDS if rental.instance_id is None else 0.0)
    while True:
        for instance in list_instances():
            if rental.owns(instance):
                return instance
        if time.monotonic() >= until:
            return None
        time.sleep(2)


def give_back(rental: Rental, say: Callable[[str], None]) -> Rental:
    """Destroys the rental's instance and asks until Vast no longer lists it. Raises NotDestroyedError.

    Returns the rental as it ended. Must run undisturbed: see `vast.interrupts`.
    """
    until, pause, reason = time.monotonic() + DESTROY_SECONDS, 1.0, "it is still listed"
    if rental.instance_id is None:
        found = _try(lambda: find(rental))
        if isinstance(found, Instance):
            rental = replace(rental, instance_id=found.instance_id)
    while True:
        if rental.instance_id is not None:
            # What it answers is of no account, only whether it is listed.
            _try(partial(destroy_instance, rental.instance_id))
        listed = _try(list_instances)
        if isinstance(listed, list):
            left = [instance for instance in listed if rental.owns(instance)]
            if not left:
                return replace(rental, ended_at=time.time())
            reason = f"it is still listed as {left[0].status}"
            rental = replace(rental, instance_id=left[0].instance_id)
        else:
            reason = str(listed)
        if time.monotonic() + pause > until or isinstance(listed, SetupError):
            raise NotDestroyedError(rental, reason)
        say(f"not destroyed yet ({reason}): again in {pause:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


class NotDestroyedError(PerpcastError):
    """It could not be shown that an instance is gone: somebody has to look, and money runs until then."""

    def __init__(self, rental: Rental, reason: str) -> None:
        named = rental.label if rental.instance_id is None else f"{rental.instance_id} ({rental.label})"
        number = rental.instance_id or "ID"
        lines = [
            f"INSTANCE {named} MAY STILL RUN at {rental.price:.2f} USD an hour: {reason}",
            "error: destroy it now: python -m vast --destroy",
            f"error: or by hand: https://cloud.vast.ai/instances/, or vastai destroy instance {number}",
        ]
        if rental.deadline:
            lines.append(f"error: its own switch should end it at {clock(rental.deadline)}; do not rely on it")
        super().__init__("\n".join(lines))


def clock(seconds: float) -> str:
    """A moment as the reader's own clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))


def _try(ask: Callable[[], object]) -> object:
    """The answer, or the error instead of it."""
    try:
        return ask()
    except PerpcastError as error:
        return error


def _locked(lock: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.2)


def _read(path: Path) -> Rental:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Rental(**{field.name: values[field.name] for field in fields(Rental)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read ({error!r}): look with python -m vast --list, destroy there what is yours, "
            "then remove the file"
        ) from None


def _write(path: Path, text: str) -> None:
    """Aside and renamed, down to the disk: what is rented must not be forgotten by a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
