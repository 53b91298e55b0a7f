# Two commands do everything on a fresh machine: `make serve` and `make test`.

PYTHON ?= python3
PORT ?= 8000
RUN ?= runs/base
BUNDLE ?= exports/models/cutline-base/2
IMAGES ?=
BIN := .venv/bin

.PHONY: serve test test-slow chaos lint bench clean

serve: .venv/.installed
	$(BIN)/python -m serving up --port $(PORT)

# On all cores; what is timed, or starts a Ray cluster or a browser, then has the machine to itself.
ALONE := ray or browser or timed
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not (slow or chaos or $(ALONE))"
	$(BIN)/python -m pytest -m "($(ALONE)) and not (slow or chaos)"

test-slow: .venv/.dev-installed
	$(BIN)/python -m pytest -m "slow and not chaos"

# An hour and a half, with nothing else on the machine: faults and load in their long forms.
chaos: LOADED = --bundle $(BUNDLE) --images $(or $(IMAGES),tests/photos)
chaos: .venv/.dev-installed
	$(BIN)/python -m pytest -m chaos
	$(BIN)/python benchmarks/load.py swaps overload slow_bodies soak $(LOADED)
	$(BIN)/python benchmarks/load.py swaps overload slow_bodies --side ray $(LOADED)
	$(BIN)/python benchmarks/load.py leavers --seconds 300 $(LOADED)
	$(BIN)/python benchmarks/load.py ray_share $(LOADED)

lint: .venv/.dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# An hour: `make bench RUN=runs/scst IMAGES=FLICKR8K/images`, with nothing else on the machine.
bench: MEASURED = --bundle $(BUNDLE) $(if $(IMAGES),--images $(IMAGES))
bench: .venv/.dev-installed
	$(BIN)/python benchmarks/engine.py --run $(RUN) $(MEASURED)
	$(BIN)/python benchmarks/ctranslate2_decoder.py --run $(RUN) $(MEASURED)
	$(BIN)/python benchmarks/skew.py $(MEASURED)
	$(BIN)/python benchmarks/service.py --run $(RUN) $(MEASURED)
	$(BIN)/python benchmarks/memory.py $(MEASURED)
	$(BIN)/python benchmarks/pretraining_steps.py $(if $(IMAGES),--images $(IMAGES))

clean:
	rm -rf .venv .venv-peers .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[cpu]"
	touch $@

.venv/.dev-installed: .venv/.installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@
