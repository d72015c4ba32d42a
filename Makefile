# The two commands: `make matrix` and `make test`. Both create .venv and install on first use.

# the interpreter of a new environment; where none is named, the fastest build of python3 on this machine
PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
# Another torch build, for example CPU wheels from PyTorch's own index:
#   make matrix TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
CONSTRAINTS ?= requirements/cpu.txt
EXTRAS ?= accelerate,dev
# one for each core: more of them start as many rank servers and win nothing
WORKERS ?= $(shell nproc)
TEST_WORKERS ?= 2
BACKEND ?= reference
REPORT ?= reports/matrix.json
# how many checks each test made when this was recorded (make counts): fewer fail the run; empty for other versions
COUNTS ?= model_matrix/counts.json
PYTEST_ARGS ?=
SOAK_JOBS ?= 10000
RUNS ?= 10
TIER ?= core
MATRIX = $(BIN)/python -m pytest -n $(WORKERS) model_matrix --fsdp-backend $(BACKEND) --fsdp-report $(REPORT) \
	$(if $(COUNTS),--fsdp-counts $(COUNTS),-o fsdp_counts=)

.PHONY: help install matrix matrix-all test lint museum soak ten-times false-alarms two-hosts fault-table counts format clean

help:
	@echo "make matrix       twenty headline models through all core tests (BACKEND=transformers for transformers' own)"
	@echo "make matrix-all   every model type of the catalogue (TIER=extended for the extended tests too)"
	@echo "make test         the kit's own tests"
	@echo "make lint         ruff, mypy --strict, schema of the workflows"
	@echo "make museum       every publicly reported bug: caught and named; prints the score, writes docs/museum.md"
	@echo "make soak         ten thousand small jobs: nothing may grow (SOAK_JOBS=1000 for fewer)"
	@echo "make ten-times    the headline matrix ten times with ten seeds: nothing may flake (RUNS=3 for fewer)"
	@echo "make false-alarms every model with ten seeds, the extended tier on the headline models (RUNS=3 for fewer)"
	@echo "make two-hosts    two hosts made of network namespaces; needs root and iproute2"
	@echo "make fault-table  writes the table of docs/harness.md from a real run"
	@echo "make counts       records how many checks each test makes, from the report of a matrix of all models"
	@echo "make clean        remove .venv, caches and reports"

install: $(VENV)/.installed

# torch first and alone: a later resolution must not swap the chosen build for another
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(or $(PYTHON),$$(sh requirements/choose_python.sh)) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) $(TORCH_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	touch $@

matrix: install
	mkdir -p $(dir $(REPORT))
	$(MATRIX) --fsdp-models headline $(PYTEST_ARGS)

matrix-all: install
	mkdir -p $(dir $(REPORT))
	$(MATRIX) --fsdp-models all --fsdp-tier $(TIER) $(PYTEST_ARGS)

test: install
	$(BIN)/python -m pytest -n $(TEST_WORKERS) tests $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

soak: install
	$(BIN)/python tests/ranks/soak.py $(SOAK_JOBS)

museum: install
	$(BIN)/python -m fsdp_testkit museum --run --jobs $(TEST_WORKERS) --json docs/museum.json
	$(BIN)/python -m fsdp_testkit.faults.museum_page
	mkdir -p reports && cp docs/museum.json reports

ten-times: install
	$(BIN)/python tests/ranks/ten_times.py --runs $(RUNS) --workers $(WORKERS)

false-alarms: install
	$(BIN)/python -m benchmarks.false_alarms --seeds $(RUNS) --workers $(WORKERS)

two-hosts: install
	$(BIN)/python -m pytest tests/ranks/two_hosts.py $(PYTEST_ARGS)

counts: install
	$(BIN)/python -m fsdp_testkit counts $(REPORT) -o $(COUNTS)

fault-table: install
	$(BIN)/python tests/ranks/write_fault_table.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache reports build *.egg-info
