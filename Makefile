# `make demo` and `make test` need nothing but Python 3.11+: the environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A shell exit inside a recipe line stops make; every target is safe to run again.
.PHONY: demo test check slow interop clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,rtx,samples,test]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python samples/demo.py

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -m 'not slow and not gpu'

slow: $(VENV)/.ready
	$(BIN)/pytest -m slow

clean:
	rm -rf $(VENV) .venv-interop build *.egg-info .mypy_cache .ruff_cache .pytest_cache
