# `make demo` and `make test` set up everything they need from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Tests wait for servers, kills and Ray, so there is one process more than there are cores; each more costs its start.
PROCESSES ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() + 1, 5))')

.PHONY: demo test test-slow test-peers lint format builtin clean

demo: $(INSTALLED)
	$(BIN)/actstore demo --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n $(PROCESSES) --dist loadfile --no-loadscope-reorder --durations=10

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

test-peers: $(INSTALLED)
	$(BIN)/python tests/peers/run.py

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "actstore needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gguf,s3,fast]'
	touch $@

clean:
	rm -rf .venv demo
