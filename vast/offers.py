"""The `vastai` command line: what is asked of it, and how its answers are read. Nothing else here talks to Vast.

Its ways, seen with version 1.9.1: a refusal by the server goes to stderr as JSON with exit code 0 and nothing on
stdout; `destroy instance` prints nothing at all under --raw, whatever came of it; `logs` prints text.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perpcast.config import VastSettings
from perpcast.errors import DataError, PerpcastError, SetupError

# The client itself waits up to 120 s for an answer, three times.
ANSWER_SECONDS = 400
BACKOFF_SECONDS = (1, 2, 4, 8, 16)
# What a machine loads beside the dataset (the image and the packages) and sends back: only to estimate transfer.
SETUP_GB, RESULT_GB = 8.0, 0.5
SHOWN_OFFERS = 5
_LOG_LINES = 1000
# TensorFlow's wheels have kernels for these; later cards fail on the first product.
_COMPUTE_CAPABILITY = "compute_cap>=800 compute_cap<1000"
_RENTABLE = f"num_gpus=1 rentable=true verified=true direct_port_count>=1 {_COMPUTE_CAPABILITY}"


class VastError(PerpcastError):
    """Vast refused a request, or gave no answer. `status` is HTTP's, 0 where there was none: it may have arrived."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_temporary(self) -> bool:
        """True where the same request may be answered later: asked too often, a server or the network is down."""
        return self.status in (0, 429) or self.status >= 500


@dataclass(frozen=True)
class Offer:
    """A machine to rent. `price` in USD an hour, the disk included; `upload`, `download` in USD/GB as it sees them."""

    offer_id: int
    machine_id: int
    gpu_name: str
    price: float
    cuda: float
    reliability: float
    disk_gb: float
    upload: float
    download: float
    place: str

    def transfer(self, dataset_gb: float) -> float:
        """An estimate of what moving image, packages, dataset and result costs, USD."""
        return (SETUP_GB + dataset_gb) * self.download + RESULT_GB * self.upload

    def total(self, hours: float, dataset_gb: float) -> float:
        """What it costs for so many hours, USD."""
        return hours * self.price + self.transfer(dataset_gb)


@dataclass(frozen=True)
class Instance:
    """A rented machine as Vast lists it. `status` is None while it is made; `address` None until it can be reached."""

    instance_id: int
    label: str
    status: str | None
    message: str
    gpu_name: str
    price: float
    started: float
    address: tuple[str, int] | None


def search_offers(vast: VastSettings, hours: float, dataset_gb: float) -> list[Offer]:
    """Offers that meet the configuration, the one that costs least for so many hours first. Raises SetupError."""
    conditions = _conditions(vast, hours)
    offers = _search(vast, conditions.values())
    if not offers:
        raise SetupError(
            f"no {vast.gpu_name} is offered with {', '.join(conditions)}; {_relaxed(vast, conditions)}; change "
            "the section vast of the configuration, or try again later"
        )
    return sorted(offers, key=lambda offer: offer.total(hours, dataset_gb))


def _conditions(vast: VastSettings, hours: float) -> dict[str, str]:
    """Vast's query for each key of the configuration."""
    return {
        f"max_price {vast.max_price:g}": f"dph_total<={vast.max_price:g}",
        f"min_reliability {vast.min_reliability:g}": f"reliability>={vast.min_reliability:g}",
        f"min_cuda {vast.min_cuda:g}": f"cuda_vers>={vast.min_cuda:g}",
        f"disk_gb {vast.disk_gb}": f"disk_space>={vast.disk_gb}",
        f"max_hours {hours:.3g}": f"duration>={hours / 24:.4f}",
    }


def _search(vast: VastSettings, conditions: Iterable[str]) -> list[Offer]:
    query = " ".join([f"gpu_name={vast.gpu_name}", _RENTABLE, *conditions])
    rows = _list_of("search", "offers", query, "--order", "dph_total", "--storage", str(vast.disk_gb), "--limit", "40")
    return [_offer(row) for row in rows]


def _relaxed(vast: VastSettings, conditions: Mapping[str, str]) -> str:
    """What there would be without each of the conditions."""
    found = []
    for left_out in conditions:
        if offers := _search(vast, [term for name, term in conditions.items() if name != left_out]):
            cheapest = min(offer.price for offer in offers)
            found.append(f"without {left_out} there are {len(offers)}, from {cheapest:.2f} USD an hour")
    return "; ".join(found) or "leaving out any one of these changes nothing"


def create_instance(offer: Offer, vast: VastSettings, label: str, onstart: str) -> int:
    """Rents the offer; the number of the instance. Raises VastError; with status 0 an instance may exist all the same.

    A second request for one offer is refused by Vast, so that one asked too often may be sent again.
    """
    answer = _answer(
        *("create", "instance", str(offer.offer_id), "--image", vast.image, "--disk", str(vast.disk_gb)),
        *("--ssh", "--direct", "--label", label, "--onstart-cmd", onstart, "--cancel-unavail"),
        again_on=(429,),
    )
    try:
        if answer["success"] is True:
            return int(answer["new_contract"])
    except (TypeError, KeyError, ValueError):
        pass
    raise VastError(f"Vast did not say which instance the offer {offer.offer_id} became, it said {str(answer)[:200]}")


def list_instances() -> list[Instance]:
    """Every instance of the account. Raises VastError, DataError: an answer that says nothing is not an empty list."""
    return [_instance(row) for row in _list_of("show", "instances")]


def destroy_instance(instance_id: int) -> None:
    """Asks Vast, once, to destroy it; only `list_instances` shows whether it did. Raises VastError."""
    _run("destroy", "instance", str(instance_id), "--yes", again_on=())


def attach_key(instance_id: int, public_key: str) -> None:
    """Asks once that the owner of the key may log in there. Raises VastError."""
    _run("attach", "ssh", str(instance_id), public_key, again_on=())


def read_log(instance_id: int) -> str:
    """The last lines that the container printed, asked for once. Raises VastError."""
    return _run("logs", str(instance_id), "--tail", str(_LOG_LINES), again_on=())


def _list_of(*arguments: str) -> list[Mapping[str, Any]]:
    rows = _answer(*arguments)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"vastai {' '.join(arguments[:2])}: expected a JSON list, received {str(rows)[:200]}")
    return rows


def _answer(*arguments: str, again_on: Sequence[int] | None = None) -> Any:
    text = _run(*arguments, again_on=again_on)
    try:
        return json.loads(text)
    except ValueError:
        raise VastError(f"vastai {' '.join(arguments[:2])}: expected JSON, received {text[:200]!r}") from None


def _run(*arguments: str, again_on: Sequence[int] | None = None) -> str:
    """What it prints. Temporary failures are tried again for half a minute, or only those with a status `again_on`."""
    for seconds in (*BACKOFF_SECONDS, None):
        try:
            return _run_once(arguments)
        except VastError as error:
            again = error.is_temporary if again_on is None else error.status in again_on
            if not again or seconds is None:
                raise
            time.sleep(seconds)
    raise AssertionError("the last turn returns or raises")


def _run_once(arguments: Sequence[str]) -> str:
    name = f"vastai {' '.join(arguments[:2])}"
    environment = {**os.environ, "VASTAI_NO_UPDATE_CHECK": "1"}
    try:
        # A session of its own: Ctrl-C must not end a request half-way. The lock is inherited, see Ledger.exclusive.
        run = subprocess.run(
            ["vastai", *arguments, "--raw"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=ANSWER_SECONDS,
            start_new_session=True,
            close_fds=False,
        )
    except FileNotFoundError:
        raise SetupError(
            "no vastai on PATH: expected Vast's own command line; pipx install vastai, then vastai set api-key KEY "
            "(or name a machine of your own with --host)"
        ) from None
    except subprocess.TimeoutExpired:
        raise VastError(f"{name}: no answer within {ANSWER_SECONDS} s; is Vast up and the network there?") from None
    if run.returncode == 2:
        raise SetupError(
            f"{name}: this vastai does not know these arguments, expected 1.9 or newer: {_last(run.stderr)}"
        )
    if refusal := _refusal(run.stderr):
        status, message = refusal
        if status in (401, 403):
            raise SetupError(f"{name}: Vast does not accept the key ({message}): vastai set api-key KEY")
        raise VastError(f"{name}: {message} (HTTP {status})", status)
    if run.returncode:
        raise VastError(f"{name}: {_last(run.stderr)}")
    return run.stdout


def _refusal(stderr: str) -> tuple[int, str] | None:
    """Status and message of the server's refusal, where the client printed one."""
    for line in stderr.splitlines():
        try:
            said = json.loads(line)
            if said["error"] is True:
                return int(said["status_code"] or 0), str(said["msg"])
        except (ValueError, TypeError, KeyError):
            continue
    return None


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def _offer(row: Mapping[str, Any]) -> Offer:
    try:
        return Offer(
            offer_id=int(row["id"]),
            machine_id=int(row["machine_id"]),
            gpu_name=str(row["gpu_name"]),
            price=float(row["dph_total"]),
            cuda=float(row["cuda_max_good"]),
            reliability=float(row.get("reliability2") or row.get("reliability") or 0),
            disk_gb=float(row["disk_space"]),
            upload=float(row.get("inet_up_cost") or 0),
            download=float(row.get("inet_down_cost") or 0),
            place=str(row.get("geolocation") or "?"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"an offer of Vast cannot be read ({error!r}): {str(row)[:200]}") from None


def _instance(row: Mapping[str, Any]) -> Instance:
    try:
        return Instance(
            instance_id=int(row["id"]),
            label=str(row.get("label") or ""),
            status=row.get("actual_status"),
            message=str(row.get("status_msg") or "").strip(),
            gpu_name=str(row.get("gpu_name") or "?"),
            price=float(row.get("dph_total") or 0),
            started=float(row.get("start_date") or 0),
            address=_address(row),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"an instance of Vast cannot be read ({error!r}): {str(row)[:200]}") from None


def _address(row: Mapping[str, Any]) -> tuple[str, int] | None:
    """The direct address alone: Vast's proxy is slow, and one more machine on the way."""
    bound = (row.get("ports") or {}).get("22/tcp")
    host = str(row.get("public_ipaddr") or "").strip()
    return (host, int(bound[0]["HostPort"])) if bound and host else None
