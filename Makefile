# What a person types. Each target sets up what it needs; `make setup` alone is never required.
#
#   make demo    the main job on digit mosaics, into runs/demo
#   make test    the test suite, ten minutes
#   make test-slow  what compiles, starts clusters, fills memory or runs examples: seven minutes more
#   make check   formatting, lint, types
#   make bench   the benchmarks, into benchmarks/results
#   make docs    the documentation, into site
#   make lock    pin the versions of every dependency anew

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-slow check bench docs lock clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# uv installs the locked versions with their hashes; it comes into the environment itself, nothing outside is touched
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==0.13.8"
	@echo "installing the locked dependencies into $(VENV) (PyTorch is large: some minutes the first time)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)
	$(BIN)/sansmax demo --output runs/demo --overwrite

# two processes of one thread each: small tensors gain nothing from threads; neighbours, which share what they need,
# stay in one process
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

# the packages that are compared with are not locked: they come beside the locked ones, which stay as they are
bench: $(READY)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements pyproject.toml --extra bench
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.published
	$(BIN)/python -m benchmarks.pneumonia

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock:
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--extra dev --extra docs --extra slides --extra ray --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) build dist site
