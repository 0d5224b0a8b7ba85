# Every target uses the virtual environment that `make install` makes in the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test

.PHONY: demo install fmt lint test test-fast test-all bench golden clean

demo: $(STAMP)
	$(BIN)/vlx pretrain mae

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

fmt: $(TEST_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The suite that .ci/run runs: everything but what needs a GPU.
test: $(TEST_STAMP)
	$(BIN)/pytest -n 2 -m "not gpu"

# A minute or two while writing: leaves out what is marked slow.
test-fast: $(TEST_STAMP)
	$(BIN)/pytest -n 2 -m "not gpu and not slow"

test-all: $(TEST_STAMP)
	$(BIN)/pytest

bench: $(TEST_STAMP)
	$(BIN)/python benchmarks/run.py

golden: $(TEST_STAMP)
	$(BIN)/pytest tests/contract -k golden --write-golden $(SLUG)

clean:
	rm -rf $(VENV) runs
