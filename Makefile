# Every target sets up what it needs in .venv and is quick when that stands already.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= deploy/local.yaml
KERNELS := $(wildcard attention/kernels/*.[ch] attention/kernels/*/*.c service/model/csrc/*.[ch])

.PHONY: serve watch test prometheus soak check format bench engine-bench evaluate loadtest clean

serve: $(VENV)/.serve-installed  ## start the service and print its URL; Ctrl-C drains it
	$(BIN)/longserve serve $(CONFIG)

watch: $(BIN)/prometheus  ## Prometheus and Grafana beside the running service; Ctrl-C ends both
	PATH="$(abspath $(BIN)):$$PATH" deploy/watch.sh

test: $(VENV)/.dev-installed  ## all tests that need no GPU; without Prometheus those that need it are skipped
	-@$(MAKE) --no-print-directory prometheus
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ray" -n auto --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest -m ray

MINUTES ?= 10
soak: $(VENV)/.dev-installed  ## a real service under mixed traffic, switches and a killed replica for MINUTES
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

prometheus: $(BIN)/prometheus  ## Prometheus and promtool into .venv, from Debian's package where none is installed

check: $(VENV)/.dev-installed  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(KERNELS)
	$(BIN)/mypy

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

bench: $(VENV)/.bench-installed  ## attention against its peers
	$(BIN)/python -m attention.benchmark

engine-bench: $(VENV)/.dev-installed  ## the engine alone, then over HTTP
	$(BIN)/python -m service.benchmark

loadtest: $(VENV)/.loadtest-installed  ## starts a service of its own, sweeps backends and lengths, writes a report to results/
	$(BIN)/python -m loadtests sweep --serve $(CONFIG) --quality service/model/embedded/README.md

evaluate: $(VENV)/.dev-installed  ## the embedded model's quality by backend and length
	$(BIN)/python -m service.training.evaluate

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/prometheus: | $(BIN)/python
	PATH="$(abspath $(BIN)):$$PATH" deploy/prometheus/install.sh $(abspath $(BIN))

$(VENV)/.serve-installed: pyproject.toml $(KERNELS) | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev-installed: pyproject.toml $(KERNELS) | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.serve-installed $(VENV)/.loadtest-installed

$(VENV)/.loadtest-installed: $(VENV)/.serve-installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[loadtest]'
	touch $@

$(VENV)/.bench-installed: $(VENV)/.dev-installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info attention/kernels/*.so
