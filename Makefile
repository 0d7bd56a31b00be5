# One word each. The raw lines stand in README.md. The stamp keeps `make` from installing twice.
PYTHON ?= python3
BIN := .venv/bin
SCALE ?= full

.PHONY: demo test test-all speedrun bench check clean

demo: .venv/installed
	$(BIN)/videogen demo

test: .venv/installed
	$(BIN)/pytest -n auto --dist loadfile

# Everything, the exhaustive versions and GPU tests (where there is a GPU) included.
test-all: .venv/installed
	$(BIN)/pytest -n auto --dist loadfile -m "slow or not slow"

# The bundled model and its student from nothing, into runs/tiny; stopped, it goes on. SCALE=smoke: every stage in minutes.
speedrun: .venv/installed
	$(BIN)/python scripts/speedrun.py --scale $(SCALE)

# Ours against diffusers on this machine: a quarter of an hour on two cores, which should have nothing else to do.
bench: .venv/installed
	$(BIN)/python scripts/benchmark.py

check: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf .venv outputs .pytest_cache .ruff_cache
