"""Trains on a GPU elsewhere: python -m vast

Rents a machine at Vast.ai, or takes one of your own (`vast.host`), trains there what the database here holds, brings
the model home, destroys the machine, and registers, scores and reports the model. Reads config.yaml (section vast);
writes what a training here writes, and .perpcast/vast/.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click

from perpcast.command_line import console, notice, open_database, show_table, stage
from perpcast.config import Settings
from perpcast.database import Database, read_models
from perpcast.errors import DataError, PerpcastError, SetupError
from perpcast.training.result import Result
from vast import interrupts
from vast.home import check_fetched, prepare, register
from vast.journey import (
    Job,
    StartError,
    check_tunnel,
    fetch_last,
    home_deadline,
    reader_role,
    revoke,
    start,
    tell,
    train_there,
)
from vast.machine import ALIAS, LostError, Machine, MachineError, Route
from vast.offers import SHOWN_OFFERS, Instance, Offer, VastError, list_instances, search_offers
from vast.rental import HOUR, PREFIX, Ledger, Purpose, Rental, clock, find, give_back, rent, stray

START_TRIES = 3
_INSTANCE_TITLES = ("label", "instance", "GPU", "status", "hours", "USD/h", "USD", "ours")


@click.command()
@click.option("--task", type=click.Choice(["regression", "classification"]), default="regression", show_default=True)
@click.option(
    "--data",
    type=click.Choice(["rsync", "tunnel"]),
    default="rsync",
    show_default=True,
    help="Send the dataset folder, or let the machine read the database through a tunnel, as a role that only reads.",
)
@click.option(
    "--host", metavar="USER@HOST[:PORT]", help="A machine of your own instead of vast.host: nothing is rented."
)
@click.option(
    "--max-cost", type=click.FloatRange(0, min_open=True), help="USD for this model, instead of vast.max_cost."
)
@click.option("--max-hours", type=click.FloatRange(0, min_open=True), help="Hours, instead of vast.max_hours.")
@click.option("--yes", is_flag=True, help="Rent and destroy without a question.")
@click.option("--list", "listing", is_flag=True, help="Show what is rented, and end.")
@click.option("--destroy", is_flag=True, help="Destroy what this clone rented, and end.")
@stage
def main(
    settings: Settings,
    task: str,
    data: str,
    host: str | None,
    max_cost: float | None,
    max_hours: float | None,
    yes: bool,
    listing: bool,
    destroy: bool,
) -> None:
    """Train on a rented GPU, or on a machine of your own, and bring the model home.

    Whatever happens, the rented machine is destroyed at the end: after a failure, Ctrl-C, a lost connection, at the cap
    of cost or hours. A killed command is run again: it finds its machine and goes on.

    \b
    Examples:
      python -m vast                                  shows the offers, asks, rents, trains
      python -m vast --max-cost 3 --yes
      python -m vast --data tunnel
      python -m vast --host me@gpu.example.org:2222   your own machine
      python -m vast --list                           what is rented, and what it costs
      python -m vast --destroy
    """
    changed = {"host": host, "max_cost": max_cost, "max_hours": max_hours}
    changed = {name: value for name, value in changed.items() if value is not None}
    settings = settings.model_copy(update={"vast": settings.vast.model_copy(update=changed)})
    ledger = Ledger(settings.path(".perpcast", "vast"))
    if listing:
        show_instances(ledger)
    elif destroy:
        destroy_ours(settings, ledger, yes=yes)
    else:
        with ledger.exclusive():
            train_elsewhere(settings, ledger, task, data, yes=yes)


def train_elsewhere(settings: Settings, ledger: Ledger, task: str, data: str, *, yes: bool) -> None:
    """From the dataset here to the registered model here."""
    check_current(settings, ledger, task)
    visit = Visit(settings, ledger)
    with interrupts.first_only():
        try:
            try:
                visit.go(task, data, yes=yes)
            finally:
                interrupts.ignore()
        finally:
            visit.leave()
    if visit.job is not None and visit.result is not None:
        prepared = visit.job.prepared
        with open_database(settings) as database:
            register(settings, database, prepared, visit.result, bill(ledger, prepared.model_id))


def check_current(settings: Settings, ledger: Ledger, task: str) -> None:
    """Raises SetupError where something is rented that this command would not go on with."""
    rental = ledger.current()
    if rental is not None and (rental.task != task or settings.vast.host is not None):
        asked = f"--task {task}" if rental.task != task else f"the host {settings.vast.host}"
        raise SetupError(f"{_other(rental)}, and this command is for {asked}. {_both_ways(rental)}")


def _other(rental: Rental) -> str:
    return f"instance {rental.instance_id or rental.label} is rented for the {rental.task} {rental.model_id}"


def _both_ways(rental: Rental) -> str:
    return (
        f"It costs {rental.price:.2f} USD an hour, until {clock(rental.deadline)} at the latest: go on with it "
        f"(python -m vast --task {rental.task}, with its configuration), or give it back (python -m vast --destroy)"
    )


@dataclass
class Visit:
    """One run of the command. What it rented or took over is given back by `leave`, whatever happened in `go`."""

    settings: Settings
    ledger: Ledger
    job: Job | None = None
    result: Result | None = None  # the model's files are here, checked, and to be registered
    keeps: bool = False  # what is rented is for something else: not this run's to end

    def go(self, task: str, data: str, *, yes: bool) -> None:
        """Until the model's files are here, or it is known to be registered already."""
        rental = self.ledger.current()
        if rental is not None and rental.data != data:
            notice(f"going on with --data {rental.data}, as it was begun")
            data = rental.data
        if data == "tunnel":
            check_tunnel(self.settings)
        with open_database(self.settings) as database:
            prepared = prepare(self.settings, database, task)
            known = last_bill(database, self.settings.vast.gpu_name)
        if rental is not None and rental.model_id != prepared.model_id:
            self.keeps = True
            raise SetupError(f"{_other(rental)}, and this command is for {prepared.model_id}. {_both_ways(rental)}")
        if prepared.is_complete:
            console.print(f"model {prepared.model_id} is trained and registered already")
            return
        self.job = Job(self.settings, prepared, task, data)
        self.result = fetched_before(self.job)
        if self.result is not None:
            notice(f"model {prepared.model_id} was fetched before")
            return
        if self.settings.vast.host is not None:
            self.use_own(self.job, self.settings.vast.host)
        else:
            self.use_rented(self.job, known, yes=yes)
        self.result = check_fetched(self.settings, prepared.model_id, prepared.dataset)

    def use_own(self, job: Job, host: str) -> None:
        """Trains on a machine that is not rented: a stopped command leaves its session running there."""
        route = Route.to_own(host, self.settings.vast.folder)
        try:
            train_there(Machine(route, None, self.settings.vast.lost_minutes * 60), job, self.ledger, None)
        except KeyboardInterrupt:
            tell(f"what has begun at {host} goes on there: the same command attaches again")
            raise

    def use_rented(self, job: Job, known: str | None, *, yes: bool) -> None:
        """Trains on the machine of a killed command, or on a new one; what is of no use is given back for the next."""
        reason = ""
        for rental in self.rentals(job, known, yes=yes):
            tell(f"instance {rental.instance_id} ({rental.label}): waiting until it runs")
            try:
                train_there(start(self.ledger, self.settings, rental), job, self.ledger, rental)
                return
            except StartError as error:
                reason = str(error)
                tell(reason)
                self.give_back()
        raise MachineError(f"no machine could be used; the last one: {reason}")

    def rentals(self, job: Job, known: str | None, *, yes: bool) -> Iterator[Rental]:
        """The one that a killed command left, then new ones, the cheapest offers first."""
        self.sweep()
        if (rental := self.taken_over()) is not None:
            yield rental
        model_id = job.prepared.model_id
        for offer in choose(self.settings, self.ledger, job, known, yes=yes)[:START_TRIES]:
            hours = affordable_hours(self.settings, self.ledger, job, offer)
            try:
                rental = rent(self.ledger, self.settings.vast, offer, Purpose(model_id, job.task, job.data), hours)
            except VastError as error:
                tell(str(error))
                self.give_back()
                continue
            yield rental

    def taken_over(self) -> Rental | None:
        """The rental of a killed command, where its instance exists and has time left."""
        rental = self.ledger.current()
        if rental is None:
            return None
        if (found := find(rental)) is None:
            tell(f"the instance of {rental.label} no longer exists")
            self.ledger.close(rental, min(time.time(), rental.deadline))
        elif time.time() >= home_deadline(rental).at:
            tell(f"instance {found.instance_id} has used its time up")
            self.give_back()
        else:
            tell(f"going on with instance {found.instance_id}, rented {_hours(rental)} h ago")
            return self.ledger.change(instance_id=found.instance_id)
        return None

    def sweep(self) -> None:
        """Destroys what this clone rented and lost sight of: only one command works for it at a time, this one."""
        current = self.ledger.current()
        for instance in list_instances():
            if instance.label.startswith(self.ledger.prefix) and not (current and current.owns(instance)):
                tell(f"instance {instance.instance_id} ({instance.label}) was left over: it is destroyed")
                give_back(stray(instance), tell)

    def leave(self) -> None:
        """Brings home what a failed training has, then destroys what is rented, then takes the role away."""
        if self.keeps:
            return
        try:
            self.rescue(sys.exception())
        finally:
            try:
                self.give_back()
            finally:
                if self.job is not None and self.job.data == "tunnel":
                    revoke(self.settings, reader_role(self.ledger))

    def rescue(self, failure: BaseException | None) -> None:
        """The last checkpoint and history, where a training has begun on a rented machine and did not end well."""
        rental = self.ledger.current()
        if rental is None or failure is None:
            return
        tell(f"giving the machine back after: {failure or 'an interruption'}")
        config = self.ledger.folder / "ssh_config"
        if rental.training and not isinstance(failure, LostError) and config.exists():
            fetch_last(Route(ALIAS, self.settings.vast.folder, config), self.settings.path(), rental.model_id)

    def give_back(self) -> None:
        """Destroys what is rented. Raises NotDestroyedError; then it stays written down."""
        rental = self.ledger.current()
        if rental is None:
            return
        ended = give_back(rental, tell)
        self.ledger.close(ended, time.time())
        if ended.instance_id is not None:
            tell(f"instance {ended.instance_id} is destroyed: {_hours(ended)} h, {ended.cost():.2f} USD")


def fetched_before(job: Job) -> Result | None:
    """What an earlier command has brought home, where it is whole."""
    try:
        return check_fetched(job.settings, job.prepared.model_id, job.prepared.dataset)
    except PerpcastError:
        return None


def choose(settings: Settings, ledger: Ledger, job: Job, known: str | None, *, yes: bool) -> list[Offer]:
    """The offers, the best one first, after a yes to its price. Raises SetupError."""
    vast = settings.vast
    offers = search_offers(vast, vast.max_hours, job.dataset_gb)
    best = offers[0]
    hours = affordable_hours(settings, ledger, job, best)
    titles = ("offer", "place", "USD/h", "CUDA", "reliable", "disk GB", "up/GB", "down/GB", f"USD, {hours:.3g} h")
    show_table(titles, [_row(offer, hours, job.dataset_gb) for offer in offers[:SHOWN_OFFERS]])
    console.print(
        f"offer {best.offer_id}: {best.gpu_name}, {best.price:.3f} USD an hour with its disk; at most {hours:.3g} h "
        f"and {best.total(hours, job.dataset_gb):.2f} USD, {best.transfer(job.dataset_gb):.2f} of it for transfer (an "
        "estimate; Vast bills it by the byte)"
    )
    console.print(f"expected: {known or f'not measured yet on {best.gpu_name}'}")
    if not yes:
        if not sys.stdin.isatty():
            raise SetupError("nothing is rented without a yes, and there is no terminal to ask: say --yes")
        click.confirm("Rent it?", abort=True)
    return offers


def affordable_hours(settings: Settings, ledger: Ledger, job: Job, offer: Offer) -> float:
    """What both caps allow, after what earlier machines cost for this model. Raises SetupError."""
    vast = settings.vast
    spent = sum(rental.cost() for rental in ledger.past(job.prepared.model_id))
    left = vast.max_cost - spent - offer.transfer(job.dataset_gb)
    if left <= 0:
        raise SetupError(
            f"the cap of {vast.max_cost:.2f} USD is used up: machines for {job.prepared.model_id} cost {spent:.2f} USD "
            f"so far, transfer would cost {offer.transfer(job.dataset_gb):.2f}; allow more with --max-cost"
        )
    return min(vast.max_hours, left / offer.price)


def _row(offer: Offer, hours: float, dataset_gb: float) -> tuple[str, ...]:
    return (
        str(offer.offer_id),
        offer.place,
        f"{offer.price:.3f}",
        f"{offer.cuda:g}",
        f"{offer.reliability:.3f}",
        f"{offer.disk_gb:.0f}",
        f"{offer.upload:.3f}",
        f"{offer.download:.3f}",
        f"{offer.total(hours, dataset_gb):.2f}",
    )


def bill(ledger: Ledger, model_id: str) -> Mapping[str, Any] | None:
    """What the machines for a model cost, together; None where none was rented."""
    rentals = ledger.past(model_id)
    if not rentals:
        return None
    last = rentals[-1]
    return {
        "gpu": last.gpu_name,
        "price_per_hour": last.price,
        "hours": sum(rental.hours() for rental in rentals),
        "cost": sum(rental.cost() for rental in rentals),
        "instance": last.instance_id,
        "offer": last.offer_id,
        "data": last.data,
    }


def last_bill(database: Database, gpu_name: str) -> str | None:
    """What the newest model cost that was trained on such a GPU."""
    for model in sorted(read_models(database), key=lambda model: model.created_at, reverse=True):
        paid = model.metrics.get("rental") or {}
        if paid.get("gpu") == gpu_name.replace("_", " "):
            return f"{paid['cost']:.2f} USD and {paid['hours']:.1f} h, as {model.model_id} took on {paid['gpu']}"
    return None


def _hours(rental: Rental) -> str:
    return f"{rental.hours():.2f}"


def readable(ledger: Ledger) -> Rental | None:
    """The current rental; a damaged note is told and otherwise taken for none: the worried are helped all the same."""
    try:
        return ledger.current()
    except DataError as error:
        tell(str(error))
        return None


def show_instances(ledger: Ledger) -> None:
    """Every instance of the account that some clone rented; those of this one are marked."""
    current = readable(ledger)
    listed = [instance for instance in list_instances() if instance.label.startswith(PREFIX)]
    if not listed:
        console.print(f"Vast lists no instance whose label begins with {PREFIX}")
        return
    rows = [_listed_row(instance, _is_ours(instance, ledger, current)) for instance in listed]
    show_table(_INSTANCE_TITLES, rows)
    if current is not None:
        console.print(f"{current.label} is for {current.model_id} and ends itself at {clock(current.deadline)}")


def _is_ours(instance: Instance, ledger: Ledger, current: Rental | None) -> bool:
    return instance.label.startswith(ledger.prefix) or bool(current and current.owns(instance))


def _listed_row(instance: Instance, is_ours: bool) -> tuple[str, ...]:
    hours = max(time.time() - instance.started, 0.0) / HOUR
    return (
        instance.label,
        str(instance.instance_id),
        instance.gpu_name,
        instance.status or "being made",
        f"{hours:.2f}",
        f"{instance.price:.3f}",
        f"{hours * instance.price:.2f}",
        "yes" if is_ours else "",
    )


def destroy_ours(settings: Settings, ledger: Ledger, *, yes: bool) -> None:
    """Destroys what this clone's file names and whatever is listed under its labels, also beside a running command."""
    current = readable(ledger)
    ours = [instance for instance in list_instances() if _is_ours(instance, ledger, current)]
    if not ours and current is None:
        console.print("nothing is rented by this clone (python -m vast --list shows those of others)")
        return
    if ours:
        show_table(_INSTANCE_TITLES, [_listed_row(instance, True) for instance in ours])
        if not yes:
            if not sys.stdin.isatty():
                raise SetupError("nothing is destroyed without a yes, and there is no terminal to ask: say --yes")
            click.confirm("Destroy?", abort=True)
    with interrupts.first_only():
        interrupts.ignore()
        for instance in ours:
            give_back(current if current is not None and current.owns(instance) else stray(instance), tell)
            console.print(f"instance {instance.instance_id} ({instance.label}) is destroyed")
        close_current(settings, ledger)


def close_current(settings: Settings, ledger: Ledger) -> None:
    """Closes the file on a rental that is gone, unless a running command does."""
    current = readable(ledger)
    if not ledger.is_free():
        notice("a python -m vast works for this clone: it ends as soon as it misses its machine, or stop it by Ctrl-C")
    elif current is not None:
        ledger.close(give_back(current, tell), time.time())
        if current.data == "tunnel":
            revoke(settings, reader_role(ledger))


if __name__ == "__main__":
    main()
