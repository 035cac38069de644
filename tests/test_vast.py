"""`python -m vast` as a user runs it, against a fake Vast whose instances are reached over real SSH: every way out ends
in destroy, and the success and the resume train for real.

Where a training's outcome is all that matters, a shell script stands in for it: the configuration's own `setup` puts it
there as `.venv/bin/python`."""

import getpass
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from sqlalchemy import text

from perpcast.config import Settings, load_settings
from perpcast.database import Database, DatabaseAddress, create_database, migrate, open_engine, read_models
from perpcast.errors import DataError, SetupError
from tests.fake_vast import API_KEY, OFFER, FakeVast, SelfDestruction
from tests.ssh_world import SshMachine, missing
from tests.test_train_script import ROOT, SHAPE, SYMBOLS, TRAINING, fill
from vast import interrupts, rental
from vast.__main__ import affordable_hours, last_bill, main
from vast.home import Prepared, prepare
from vast.journey import Job
from vast.machine import Deadline, OutOfTimeError, Route, host_key_in
from vast.offers import list_instances, search_offers
from vast.rental import Ledger, NotDestroyedError, Rental, give_back, onstart_text
from vast.target import main as target

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a machine")

WAIT_SECONDS = 240
# Reads its arguments as vast.self_check and vast.remote do; `behaviour` is what the training then does.
STAND_IN = """#!/usr/bin/env bash
if [ "$2" = vast.self_check ]; then
  [ ! -e {folder}/no_gpu ] || {{ rm {folder}/no_gpu; echo "no GPU here" >&2; exit 1; }}
  exit 0
fi
while [ $# -gt 0 ]; do
  [ "$1" != --model ] || model=$2
  shift
done
mkdir -p "logs/training_$model"
cd "logs/training_$model"
[ ! -e checkpoint ] || echo "it goes on from $(cat checkpoint)"
echo 1 >checkpoint
echo "it trains"
. {folder}/behaviour
"""
UNTIL_STOPPED = "sleep 1000 & wait $!\n"


@dataclass(frozen=True)
class Stock:
    """A database with prepared candles and the dataset made of it, shared by the tests of this file."""

    folder: Path
    values: dict[str, Any]
    database: Database
    address: DatabaseAddress
    prepared: Prepared


@pytest.fixture(scope="module")
def stock(postgres: DatabaseAddress, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    address = changed(postgres, name="vast_rented")
    create_database(address)
    database = open_engine(address)
    migrate(database)
    values = yaml.safe_load((ROOT / "config.yaml").read_text())
    values["database"].update(port=address.port, name=address.name, user=address.user)
    values["data_download"].update(symbols=list(SYMBOLS))
    values["model"].update(**SHAPE, **TRAINING)
    folder = tmp_path_factory.mktemp("stock")
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    settings = load_settings([folder / "config.yaml"])
    fill(database, settings)
    prepared = prepare(settings, database, "regression")
    yield Stock(folder, values, database, address, prepared)
    database.dispose()


class Home:
    """A folder with a configuration of its own, a fake account of Vast, and the command."""

    def __init__(self, folder: Path, stock: Stock, vast: FakeVast) -> None:
        self.folder, self.stock, self.vast = folder / "home", stock, vast
        self.there = folder / "there" / "perpcast"
        self.model_id = stock.prepared.model_id
        shutil.copytree(stock.folder / "datasets", self.folder / "datasets")
        stand_in = folder / "stand_in"
        stand_in.write_text(STAND_IN.format(folder=folder))
        stand_in.chmod(0o755)
        self._behaviour, self.no_gpu = folder / "behaviour", folder / "no_gpu"
        self._output = folder / "output"
        self._started: list[subprocess.Popen[str]] = []
        self._settings = {
            **stock.values["vast"],
            "folder": str(self.there),
            "setup": f"mkdir -p .venv/bin && cp {stand_in} .venv/bin/python",
            "device": "cpu",
            "max_hours": 1.0,
            "start_minutes": 0.5,
            "lost_minutes": 0.05,
        }
        self.configure()
        self.behave(UNTIL_STOPPED)

    def configure(self, **vast: Any) -> None:
        """Other values in the section vast."""
        self._settings.update(vast)
        (self.folder / "config.yaml").write_text(yaml.safe_dump({**self.stock.values, "vast": self._settings}))

    @property
    def settings(self) -> Settings:
        return load_settings([self.folder / "config.yaml"])

    def behave(self, script: str) -> None:
        """What the stand-in does once it trains."""
        self._behaviour.write_text(script)

    def train_for_real(self, **model: Any) -> None:
        """The machine gets this clone's own packages; other values in the section model."""
        self.stock = changed(self.stock, values={**self.stock.values, "model": {**self.stock.values["model"], **model}})
        self.configure(setup=f"ln -sfn {Path(sys.executable).parents[1]} .venv", lost_minutes=0.5)

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """The command in a process of its own, in a session as a terminal gives one."""
        command = [sys.executable, "-m", "vast", "--config", str(self.folder / "config.yaml"), *options]
        with self._output.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def close(self) -> None:
        """Ends what a failed test has left."""
        for process in self._started:
            process.kill()
            process.wait()

    @property
    def environment(self) -> dict[str, str]:
        password = self.stock.address.password or ""
        path = f"{self.vast.bin}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "VAST_API_KEY": API_KEY, "PERPCAST_DB_PASSWORD": password}

    @property
    def output(self) -> str:
        """What the last command has printed, without the breaks of its lines."""
        return " ".join(self._output.read_text().split())

    def run(self, *options: str, **environment: str) -> int:
        """The command to its end; its exit code."""
        return self.start(*options, **environment).wait(WAIT_SECONDS)

    def invoke(self, *options: str, **environment: str) -> Result:
        """The command in this process, for what rents nothing."""
        arguments = ["--config", str(self.folder / "config.yaml"), *options]
        return CliRunner().invoke(main, arguments, env={**self.environment, **environment})

    def until_it_trains(self, *options: str) -> subprocess.Popen[str]:
        """The command, started, once the training there has said so."""
        process = self.start("--yes", *options)
        self.wait_for(lambda: "it trains" in self.output, process)
        return process

    def wait_for(self, condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
        until = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert process is None or process.poll() is None, self.output
            assert time.monotonic() < until, self.output
            time.sleep(0.05)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder / ".perpcast" / "vast")

    @property
    def machine(self) -> SshMachine:
        """The one machine that is rented."""
        (instance,) = self.vast.instances
        return self.vast.machine(instance["id"])

    @property
    def checkpoint(self) -> Path:
        return self.folder / "logs" / f"training_{self.model_id}" / "checkpoint"

    def assert_nothing_is_left(self, rented: int = 1) -> None:
        """Every instance is gone from the account, with whatever ran there, and so is the note of it."""
        assert self.vast.instances == [], self.output
        assert self.ledger.current() is None
        assert len(list((self.ledger.folder / "history").iterdir())) == rented
        assert self.vast.asked.count("create instance") == rented
        for number in range(7001, 7001 + rented):
            assert self.vast.machine(number).processes() == {}
        assert local_children(self.folder.parent) == []


def local_children(folder: Path) -> list[str]:
    """Processes here that name the folder: what a command left behind."""
    listed = subprocess.run(["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=True).stdout
    named = [line for line in listed.splitlines() if str(folder) in line and "sshd" not in line]
    return [line for line in named if "pytest" not in line]


@pytest.fixture
def home(tmp_path: Path, stock: Stock) -> Iterator[Home]:
    vast = FakeVast(tmp_path / "vast")
    with SelfDestruction(vast) as server:
        vast.make(tmp_path / "there", server.url)
        (tmp_path / "home").mkdir()
        one = Home(tmp_path, stock, vast)
        yield one
        one.close()
        for folder in vast.folder.glob("instance_*"):
            machine = SshMachine(folder)
            machine.thaw()
            machine.power_off()
        server.shutdown()


# --- every way out ends in destroy ----------------------------------------------------------------------------------


def test_full_disk_there_brings_the_checkpoint_home_and_goes_on_elsewhere(home: Home) -> None:
    """Vast's answer to the first request is lost besides: the instance is found by its label."""
    home.vast.turn(lose_answer=True)
    home.behave("cat /dev/zero >/dev/full || exit 1\n")
    assert home.run("--yes") == 1
    assert "No space left on device" in home.output
    assert "the training failed with exit code 1" in home.output
    assert home.checkpoint.read_text() == "1\n"
    home.assert_nothing_is_left()
    home.vast.turn(offers=[{**OFFER, "id": 102}], statuses=[None, "loading", "running"])
    home.behave("exit 1\n")
    assert home.run("--yes") == 1
    assert "it goes on from 1" in home.output
    home.assert_nothing_is_left(rented=2)


def test_ctrl_c_twice_destroys_once_and_undisturbed(home: Home) -> None:
    process = home.until_it_trains()
    home.vast.turn(refuse=[["destroy instance", 500, 1]])
    process.send_signal(signal.SIGINT)
    home.wait_for(lambda: "giving the machine back" in home.output, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_SECONDS) == 130
    assert "interrupted; run the same command again to go on" in home.output
    assert home.checkpoint.exists()
    home.assert_nothing_is_left()


def test_closed_terminal_destroys(home: Home) -> None:
    """The first machine is of no use: the signal comes while the second one trains."""
    home.no_gpu.touch()
    with home.vast.state() as state:
        state["offers"].append({**OFFER, "id": 102, "dph_total": 0.4})
    process = home.until_it_trains()
    assert "is of no use to TensorFlow" in home.output
    process.send_signal(signal.SIGHUP)
    assert process.wait(WAIT_SECONDS) == 143
    home.assert_nothing_is_left(rented=2)


def test_killed_before_vast_answered_and_again_in_training_goes_on_where_it_was(home: Home) -> None:
    home.vast.turn(answer_after=3.0)
    process = home.start("--yes")
    home.wait_for(lambda: home.vast.instances, process)
    process.kill()
    process.wait(WAIT_SECONDS)
    asked_for = home.ledger.current()
    assert asked_for is not None
    assert asked_for.instance_id is None

    again = home.until_it_trains()
    assert "going on with instance 7001" in home.output
    again.kill()
    again.wait(WAIT_SECONDS)
    there = home.machine.processes()

    last = home.until_it_trains("--data", "tunnel")
    assert "going on with --data rsync, as it was begun" in home.output
    assert "sync:" not in home.output
    assert set(there) & set(home.machine.processes())
    last.terminate()
    assert last.wait(WAIT_SECONDS) == 143
    home.assert_nothing_is_left()


def test_cap_of_cost_destroys(home: Home) -> None:
    """5 s at 0.36 USD an hour; home leaves the last tenth to the way out."""
    home.vast.turn(offers=[{**OFFER, "id": 101, "inet_up_cost": 0.0, "inet_down_cost": 0.0}])
    assert home.run("--yes", "--max-cost", str(5 / 3600 * 0.36)) == 1
    assert "the time for 0.00 USD, 0.00139 hours, is used up" in home.output
    home.assert_nothing_is_left()
    (ended,) = home.ledger.past(home.model_id)
    assert ended.deadline - ended.created_at == pytest.approx(5)


def test_cap_of_hours_is_kept_by_the_instance_itself_where_home_is_gone(home: Home) -> None:
    process = home.start("--yes", "--max-hours", str(6 / 3600))
    home.wait_for(lambda: (current := home.ledger.current()) and current.instance_id, process)
    process.kill()
    process.wait(WAIT_SECONDS)
    assert home.vast.instances
    home.wait_for(lambda: not home.vast.instances)
    assert "destroy instance" not in home.vast.asked
    current = home.ledger.current()
    assert current is not None
    assert time.time() >= int(current.deadline)
    assert home.invoke("--destroy", "--yes").exit_code == 0
    home.assert_nothing_is_left()


def test_lost_network_destroys_although_vast_is_busy(home: Home) -> None:
    """The checkpoint at home is that of the copy that was made while it trained."""
    home.configure(fetch_minutes=0.01)
    process = home.until_it_trains()
    home.wait_for(home.checkpoint.exists, process)
    home.vast.turn(refuse=[["destroy instance", 502, 2], ["show instances", 429, 1]])
    home.machine.stop()
    assert process.wait(WAIT_SECONDS) == 1
    assert "no connection to perpcast-gpu for 0.05 minutes" in home.output
    home.assert_nothing_is_left()


def test_host_key_other_than_the_printed_one_is_refused_before_any_data(home: Home) -> None:
    home.vast.turn(impostor=True)
    home.configure(start_minutes=0.05)
    assert home.run("--yes") == 1
    assert "shows another host key than the one pinned" in home.output
    assert "sync:" not in home.output
    assert not home.there.exists()
    home.assert_nothing_is_left()


def test_host_key_changed_while_it_trains_destroys(home: Home) -> None:
    process = home.until_it_trains()
    home.machine.change_host_key()
    home.machine.drop_connections()
    assert process.wait(WAIT_SECONDS) == 1
    assert "does not show the host key that was pinned" in home.output
    assert not home.checkpoint.exists()
    home.assert_nothing_is_left()


def test_instances_that_never_start_are_given_back_three_at_most(home: Home) -> None:
    offers = [{**OFFER, "id": number, "dph_total": number / 1000} for number in range(101, 105)]
    home.vast.turn(statuses=["loading"], offers=offers)
    home.configure(start_minutes=0.02)
    assert home.run("--yes") == 1
    assert "instance 7003 did not start within 0.02 minutes: it is loading" in home.output
    home.assert_nothing_is_left(rented=3)
    with home.vast.state() as state:
        assert [offer["id"] for offer in state["offers"]] == [104]


# --- a machine of one's own -----------------------------------------------------------------------------------------


def test_own_machine_keeps_its_session_when_the_command_is_stopped(home: Home) -> None:
    own = SshMachine(home.vast.folder / "instance_own")
    own.start()
    config = home.vast.folder / "own_config"
    config.write_text(
        f"Host *\n  IdentityFile {own.client_key}\n  IdentitiesOnly yes\n  UserKnownHostsFile {own.known_hosts}\n"
    )
    (home.vast.bin / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
    host = f"{getpass.getuser()}@127.0.0.1:{own.port}"
    process = home.until_it_trains("--host", host)
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_SECONDS) == 130
    assert f"what has begun at {host} goes on there: the same command attaches again" in home.output

    again = home.until_it_trains("--host", host)
    assert "attached to it" in home.output
    for pid, command in own.processes().items():
        if command.startswith("sleep 1000"):
            os.kill(pid, signal.SIGKILL)
    assert again.wait(WAIT_SECONDS) == 1
    assert "the training failed with exit code 137" in home.output
    assert home.vast.asked == []


# --- real trainings -------------------------------------------------------------------------------------------------


def test_rented_training_ends_in_a_registered_model_and_its_bill(home: Home) -> None:
    home.train_for_real()
    assert home.run("--yes") == 0, home.output
    home.assert_nothing_is_left()
    (model,) = [one for one in read_models(home.stock.database) if one.model_id == home.model_id]
    (ended,) = home.ledger.past(home.model_id)
    bill = model.metrics["rental"]
    assert bill.pop("cost") == pytest.approx(bill["hours"] * 0.36)
    assert bill == {
        "gpu": "RTX 4090",
        "price_per_hour": 0.36,
        "hours": pytest.approx(ended.hours()),
        "instance": 7001,
        "offer": 101,
        "data": "rsync",
    }
    assert f"as {home.model_id} took on RTX 4090" in (last_bill(home.stock.database, "RTX_4090") or "")
    assert (home.folder / "reports" / home.model_id / "index.html").exists()
    asked = home.vast.asked
    again = home.invoke("--yes")
    assert again.exit_code == 0
    assert f"model {home.model_id} is trained and registered already" in again.output
    assert home.vast.asked == asked


def test_training_over_the_tunnel_survives_a_lost_connection_and_a_kill(home: Home) -> None:
    home.train_for_real(epochs=4)
    process = home.start("--yes", "--data", "tunnel")
    home.wait_for(lambda: "epoch 1: loss" in home.output, process)
    assert "sync: datasets" not in home.output
    assert home.machine.drop_connections() >= 2  # the log's and the tunnel's
    time.sleep(1)
    process.kill()
    process.wait(WAIT_SECONDS)
    assert len(readers(home)) == 1

    assert home.run("--yes", "--data", "tunnel") == 0, home.output
    assert "going on with instance 7001" in home.output
    home.assert_nothing_is_left()
    assert readers(home) == []
    (model,) = [one for one in read_models(home.stock.database) if one.parameters["epochs"] == 4]
    assert model.metrics["rental"]["data"] == "tunnel"
    assert len(model.metrics["history"]["loss"]) == 4


def readers(home: Home) -> list[str]:
    """The roles that a machine was given."""
    with home.stock.database.connect() as connection:
        return list(
            connection.execute(text("SELECT rolname FROM pg_roles WHERE rolname LIKE 'perpcast_gpu_%'")).scalars()
        )


# --- offers, caps and the account -----------------------------------------------------------------------------------


@pytest.fixture
def account(home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home whose account this process may ask."""
    for name in ("PATH", "VAST_API_KEY"):
        monkeypatch.setenv(name, home.environment[name])
    return home


def test_offer_that_costs_least_in_all_comes_first(account: Home) -> None:
    """For 10 h and 2 GB, 8 GB of packages and 0.5 GB back: A 10 x 0.30 + 10 x 0.02 = 3.20; B 10 x 0.25 + 10 x 0.1
    + 0.5 x 0.4 = 3.70; C 10 x 0.29 + 10 x 0.05 + 0.5 x 0.2 = 3.50; D is too dear for max_price, E an RTX 5090."""
    terms = [(0.30, 0.02, 0.0), (0.25, 0.1, 0.4), (0.29, 0.05, 0.2), (0.61, 0.0, 0.0)]
    offers = [
        {**OFFER, "id": number, "dph_total": price, "inet_down_cost": down, "inet_up_cost": up}
        for number, (price, down, up) in enumerate(terms)
    ]
    account.vast.turn(offers=[*offers, {**OFFER, "id": 9, "dph_total": 0.1, "compute_cap": 1200}])
    found = search_offers(account.settings.vast, 10, 2)
    assert [(offer.offer_id, round(offer.total(10, 2), 6)) for offer in found] == [(0, 3.2), (2, 3.5), (1, 3.7)]


def test_without_an_offer_the_condition_to_relax_is_named(account: Home) -> None:
    account.vast.turn(offers=[{**OFFER, "id": 1, "dph_total": 0.75}])
    with pytest.raises(SetupError) as refused:
        search_offers(account.settings.vast, 1, 0)
    assert "without max_price 0.6 there are 1, from 0.75 USD an hour" in str(refused.value)
    assert "without min_cuda" not in str(refused.value)


def test_both_caps_bound_the_hours_and_earlier_machines_count(account: Home) -> None:
    """Transfer costs 8 x 0.005 + 0.5 x 0.01 = 0.045 USD, an hour 0.36; an earlier machine took 2 h at 0.5."""
    (offer,) = search_offers(account.settings.vast, 1, 0)
    job = Job(account.settings, account.stock.prepared, "regression", "rsync")
    transfer = offer.transfer(job.dataset_gb)
    assert transfer == pytest.approx(0.045, abs=1e-4)
    cases = [(10.0, 12.0, 12.0), (1.0, 12.0, (1 - transfer) / 0.36), (1.0, 0.5, 0.5)]
    for max_cost, max_hours, hours in cases:
        account.configure(max_cost=max_cost, max_hours=max_hours)
        assert affordable_hours(account.settings, account.ledger, job, offer) == pytest.approx(hours)
    account.ledger.close(changed(some_rental(account), price=0.5, created_at=0.0), 7200.0)
    account.configure(max_cost=1.5, max_hours=12.0)
    assert affordable_hours(account.settings, account.ledger, job, offer) == pytest.approx((0.5 - transfer) / 0.36)
    account.configure(max_cost=1.0)
    with pytest.raises(SetupError, match="the cap of 1.00 USD is used up: machines for .* cost 1.00 USD so far"):
        affordable_hours(account.settings, account.ledger, job, offer)


def some_rental(home: Home, **changes: Any) -> Rental:
    """A rental as the ledger may hold it."""
    now = time.time()
    begun = Rental("perpcast-x-1", home.model_id, "regression", "rsync", 1, "RTX 4090", 0.36, now, now + 3600, 7001)
    return changed(begun, **changes)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VAST_API_KEY": "another"}, "Vast does not accept the key (Invalid user key): vastai set api-key KEY"),
        ({"PATH": "/usr/bin:/bin"}, "no vastai on PATH"),
        ({}, "there is no terminal to ask: say --yes"),
    ],
)
def test_what_the_user_must_put_right_is_told_and_nothing_rented(
    home: Home, environment: dict[str, str], message: str
) -> None:
    refused = home.invoke(**environment)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert home.vast.instances == []


def create(home: Home, label: str) -> None:
    """An instance that somebody rented."""
    number = len(home.vast.instances) + 201
    with home.vast.state() as state:
        state["offers"].append({**OFFER, "id": number})
    options = ("--image", "i", "--disk", "60", "--ssh", "--direct", "--label", label, "--onstart-cmd", "true")
    home.vast.answer(["create", "instance", str(number), *options, "--cancel-unavail", "--raw"], API_KEY)


def test_list_marks_and_destroy_takes_only_what_this_clone_rented(home: Home) -> None:
    create(home, f"{home.ledger.prefix}0001")
    create(home, "perpcast-ffffffff-0001")
    create(home, "somebody's own")
    listed = home.invoke("--list")
    assert listed.exit_code == 0
    (ours,) = [line for line in listed.output.splitlines() if home.ledger.prefix in line]
    (other,) = [line for line in listed.output.splitlines() if "perpcast-ffffffff" in line]
    assert "yes" in ours
    assert "yes" not in other
    assert "somebody" not in listed.output

    asked = home.invoke("--destroy")
    assert asked.exit_code == 2
    assert len(home.vast.instances) == 3
    destroyed = home.invoke("--destroy", "--yes")
    assert destroyed.exit_code == 0
    assert "instance 7001 " in destroyed.output
    assert [one["label"] for one in home.vast.instances] == ["perpcast-ffffffff-0001", "somebody's own"]
    assert "nothing is rented by this clone" in home.invoke("--destroy", "--yes").output


def test_rental_for_another_model_or_task_is_kept_and_both_ways_named(home: Home) -> None:
    create(home, "perpcast-x-1")
    for changes, options in (
        ({"model_id": "tft-other"}, ()),
        ({"task": "classification"}, ()),
        ({}, ("--host", "a@b")),
    ):
        home.ledger.write(some_rental(home, **changes))
        refused = home.invoke("--yes", *options)
        assert refused.exit_code == 2
        assert "go on with it (python -m vast --task" in refused.stderr
        assert "or give it back (python -m vast --destroy)" in refused.stderr
    assert len(home.vast.instances) == 1
    assert home.ledger.current() is not None


def test_second_command_waits_for_nobody(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rental, "LOCK_SECONDS", 0.1)
    with home.ledger.exclusive():
        refused = home.invoke("--yes")
    assert refused.exit_code == 2
    assert "another python -m vast works for this clone" in refused.stderr


def test_instance_that_cannot_be_destroyed_is_shouted_and_kept_in_mind(
    account: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rental, "DESTROY_SECONDS", 0.1)
    create(account, "perpcast-x-1")
    account.ledger.write(some_rental(account))
    account.vast.turn(refuse=[["destroy instance", 500, 9]])
    refused = account.invoke("--destroy", "--yes")
    assert refused.exit_code == 1
    assert "INSTANCE 7001 (perpcast-x-1) MAY STILL RUN at 0.36 USD an hour: it is still listed" in refused.stderr
    assert "vastai destroy instance 7001" in refused.stderr
    assert account.ledger.current() is not None
    with pytest.raises(NotDestroyedError):
        give_back(some_rental(account), print)
    account.vast.turn(refuse=[])
    assert account.invoke("--destroy", "--yes").exit_code == 0
    assert list_instances() == []
    assert account.ledger.current() is None


# --- parts ----------------------------------------------------------------------------------------------------------


def test_scripts_are_told_the_rented_machine_else_the_own_one(home: Home) -> None:
    def told() -> Result:
        return CliRunner().invoke(target, ["--config", str(home.folder / "config.yaml")])

    assert told().exit_code == 2
    home.configure(host="me@gpu:2222")
    assert told().stdout.splitlines() == ["config=", "host=me@gpu:2222", f"folder={home.there}"]
    home.ledger.write(some_rental(home))
    assert told().exit_code == 2  # not reachable yet
    (home.ledger.folder / "ssh_config").write_text("")
    assert told().stdout.splitlines()[:2] == [f"config={home.ledger.folder}/ssh_config", "host=perpcast-gpu"]


@pytest.mark.parametrize(
    ("host", "route"),
    [
        ("me@gpu", Route("me@gpu", "/a/b")),
        ("me@gpu:2222", Route("me@gpu", "/a/b", port=2222)),
        ("me@gpu:0", None),
        ("me@gpu:ssh", None),
    ],
)
def test_own_host_may_have_a_port(host: str, route: Route | None) -> None:
    if route is None:
        with pytest.raises(SetupError, match="expected user@host or user@host:port"):
            Route.to_own(host, "/a/b")
    else:
        assert Route.to_own(host, "/a/b") == route


def test_host_key_is_the_one_printed_last() -> None:
    assert host_key_in("hello\nperpcast-host-key: ssh-rsa AAAA\nperpcast-host-key:\n") is None
    log = "perpcast-host-key: ssh-ed25519 AAAA root@a\nmore\nperpcast-host-key: ssh-ed25519 BBBB\n"
    assert host_key_in(log) == "ssh-ed25519 BBBB"


def test_deadline_comes_although_somebody_sets_the_clock_back(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = Deadline(time.time() + 60, "time")
    deadline.check()
    ticks = time.monotonic()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: ticks + 61)
    with pytest.raises(OutOfTimeError):
        deadline.check()


def test_signal_during_a_request_waits_for_its_answer() -> None:
    answers = []

    def ask() -> None:
        with interrupts.held_back():
            signal.raise_signal(signal.SIGINT)
            answers.append("rented")

    with pytest.raises(KeyboardInterrupt):
        ask()
    assert answers == ["rented"]


@pytest.mark.parametrize(
    ("price", "hours"),
    [
        (0.36, 1.0),
        (0.30, 1.0),
        (0.72, 0.5),  # 0.36 USD at 0.72 an hour
    ],
)
def test_dearer_instance_than_offered_has_fewer_hours(home: Home, price: float, hours: float) -> None:
    dearer = some_rental(home).at_price(price)
    assert dearer.deadline - dearer.created_at == pytest.approx(3600 * hours)
    assert dearer.price == max(price, 0.36)


def test_instance_is_told_its_deadline() -> None:
    lines = onstart_text(1_700_000_000.9).splitlines()
    assert lines[:2] == ["#!/bin/sh", "export PERPCAST_DEADLINE=1700000000"]


def test_child_ends_with_the_process_that_started_it_even_where_it_will_not(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    stubborn = f"trap '' TERM; touch {mark}; while :; do sleep 0.1; done"
    program = f"from vast.machine import Child; Child(['bash', '-c', {stubborn!r}]).wait(None)"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    until = time.monotonic() + WAIT_SECONDS
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while local_children(mark):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_copy_of_a_clone_has_labels_of_its_own(home: Home, tmp_path: Path) -> None:
    prefix = home.ledger.prefix
    assert home.ledger.prefix == prefix
    shutil.copytree(home.ledger.folder, tmp_path / "copy")
    assert Ledger(tmp_path / "copy").prefix != prefix


def test_damaged_note_of_a_rental_is_not_taken_for_none(home: Home) -> None:
    written = some_rental(home)
    home.ledger.write(written)
    assert home.ledger.current() == written
    (home.ledger.folder / "rental.json").write_text("{}")
    with pytest.raises(DataError, match="look with python -m vast --list"):
        home.ledger.current()
    create(home, f"{home.ledger.prefix}0001")
    assert home.invoke("--destroy", "--yes").exit_code == 0
    assert home.vast.instances == []
