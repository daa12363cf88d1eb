# Each target makes its own virtual environment on first use, from pyproject.toml alone:
# A machine needs only Python 3.11 or newer and make.
#
#   make demo                        train on real images: table and picture
#   make test                        the fast tests
#   make test PYTHON=python3.12      the same on another interpreter, in .venv-python3.12

PYTHON ?= python3
VENV ?= $(if $(filter-out python3,$(PYTHON)),.venv-$(subst /,_,$(PYTHON)),.venv)
BIN := $(VENV)/bin
# A worker begins with its own half of the tests, as neighbours share what they compile.
PYTEST_ARGS ?= -n auto --dist worksteal

.PHONY: help demo benchmark test slow step-times lint types build clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:
	@echo "make demo    train the quick start (a minute on 2 cores, once installed)"
	@echo "make benchmark   a small table of CIFAR-10 runs, or of digits without CIFAR-10"
	@echo "make test    fast tests"
	@echo "make slow    tests that take longer"
	@echo "make step-times  a quick look at what steps take, with pytest-benchmark"
	@echo "make lint    ruff: format and lint"
	@echo "make types   pyright"
	@echo "make build   wheel and source archive in dist/"
	@echo "make clean   remove environments, caches and build outputs"

demo: $(VENV)/.examples
	$(BIN)/python examples/quickstart.py --out out/quickstart

benchmark: $(VENV)/.bench
	$(BIN)/python -m benchmarks sweep cifar10 --preset reduced --out out/benchmark
	$(BIN)/python -m benchmarks report --results out/benchmark --out out/benchmark

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -m "not slow" $(PYTEST_ARGS)

slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

step-times: $(VENV)/.test
	$(BIN)/python -m pytest -q benchmarks/costs/_step_times.py --benchmark-group-by=param:network \
	  --benchmark-columns=median,iqr,rounds

lint: $(VENV)/.dev
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

types: $(VENV)/.dev
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

build: $(VENV)/.dev
	$(BIN)/python -m build

# One environment, filled as far as a target needs, and again when pyproject.toml changes.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	"alrao-jax needs Python 3.11 or newer, but $(PYTHON) is %d.%d. Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.examples: pyproject.toml | $(VENV)/.created
	@echo "Installing into $(VENV) (a minute or two the first time) ..."
	$(BIN)/python -m pip install --quiet --editable ".[examples]"
	@touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/.created
	@echo "Installing into $(VENV) (a minute or two the first time) ..."
	$(BIN)/python -m pip install --quiet --editable ".[examples,bench]"
	@touch $@ $(VENV)/.examples

$(VENV)/.test: pyproject.toml | $(VENV)/.created
	@echo "Installing into $(VENV) (a minute or two the first time) ..."
	$(BIN)/python -m pip install --quiet --editable ".[examples,bench]" --group test
	@touch $@ $(VENV)/.examples $(VENV)/.bench

$(VENV)/.dev: pyproject.toml | $(VENV)/.created
	@echo "Installing into $(VENV) (a minute or two the first time) ..."
	$(BIN)/python -m pip install --quiet --editable ".[examples,bench]" --group dev
	@touch $@ $(VENV)/.examples $(VENV)/.bench $(VENV)/.test

clean:
	rm -rf .venv .venv-* build dist out .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
