# Every target sets up .venv by itself. `make demo` and `make test` are all that a newcomer needs.
SHELL := /bin/sh
PYTHON := .venv/bin/python
PEERS := benchmarks/peers/.venv

# Where HOME cannot be written (a container, a service account), every cache lies inside the clone.
ifneq ($(shell test -n "$$HOME" && test -d "$$HOME" && test -w "$$HOME" && echo yes),yes)
export HOME := $(CURDIR)/.cache/home
export XDG_CACHE_HOME := $(CURDIR)/.cache
export XDG_CONFIG_HOME := $(CURDIR)/.cache/config
export XDG_DATA_HOME := $(CURDIR)/.cache/data
$(shell mkdir -p "$(CURDIR)/.cache/home")
endif

.PHONY: demo test check bench soak lock clean

demo: .venv/.train
	@$(PYTHON) run_futures_pipeline.py --demo

# Three at a time on two processors: for much of its time a test waits for a server, a line or a lock.
test: check
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: .venv/.dev
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

bench: .venv/.dev $(PEERS)/.done
	$(PYTHON) -m benchmarks

soak: .venv/.dev $(PEERS)/.done
	$(PYTHON) -m pytest --soak -n 2 --dist loadfile --no-loadscope-reorder

# The lock files hold hashes and no host names; uv.lock holds host names and stays out of git.
lock:
	UV_SYSTEM_CERTS=1 uv lock
	for extra in train gpu; do UV_SYSTEM_CERTS=1 uv export --quiet --locked --no-emit-project --no-header --extra $$extra --output-file requirements/$$extra.lock; done
	UV_SYSTEM_CERTS=1 uv export --quiet --locked --no-emit-project --no-header --extra train --extra dev --output-file requirements/dev.lock

.venv/.dev: requirements/dev.lock
	@requirements/install.sh dev

# The dev packages contain the training packages: do not take them away again for a demo.
.venv/.train: requirements/train.lock
	@if [ -e .venv/.dev ] && ! [ requirements/dev.lock -nt .venv/.dev ]; then touch $@; else requirements/install.sh train; fi

# The libraries that bench and soak compare with: plain pip, no lock. torch comes first, so that its build is pip's choice.
$(PEERS)/.done: benchmarks/peers/requirements.txt | .venv/.dev
	@echo "setup: installing benchmarks/peers/requirements.txt into $(PEERS) (PyTorch: a few minutes)"
	@rm -rf $(PEERS)
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check "$$(grep ^torch== $<)"
	@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check --requirement $<
	@touch $@

clean:
	rm -rf .venv .tools .cache $(PEERS)
