"""One library's training step in a process of its own: benchmarks/training.py runs it, and reads a line of JSON.

Timed are network, squared error, gradients and Adam on one batch that is in memory.
"""

import json
import resource
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]

from benchmarks.peers.networks import Shape, build


def _main(task: str) -> None:
    told: dict[str, Any] = json.loads(task)
    torch.set_num_threads(told["threads"])
    with np.load(told["batch"]) as arrays:
        inputs = {name: torch.as_tensor(values) for name, values in arrays.items()}
    targets = inputs.pop("targets")[:, None]
    inputs["static_categories"] = inputs["static_categories"].long()
    network = build(told["library"], Shape(**told["shape"]), told["seed"], told["hidden_continuous"])
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), told["learning_rate"])
    forward = torch.compile(network) if told["compiled"] else network

    def step() -> float:
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(forward(inputs), targets).backward()
        optimizer.step()
        return time.perf_counter() - begun

    first, _ = step(), step()
    spent = [step()]
    while not (sum(spent) >= told["seconds"] or (len(spent) >= told["steps"] and sum(spent) >= told["seconds"] / 4)):
        spent.append(step())
    found = {
        "first": first,
        "spent": spent,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        # The parent's memory, which this counts in, is far below a network's.
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _main(sys.argv[1])
