# The two commands of the README are `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test soak both-ways check package snapshots format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## train a small GPT on Python's own source, about two minutes
	$(BIN)/python examples/gpt.py || test $$? -eq 85

test: $(VENV)/.installed  ## all tests, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

soak: $(VENV)/.installed  ## 2,000 kills at random; each line names the seed that does the same again
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --kills 2000

both-ways: $(VENV)/.installed  ## each row of the ejector's matrix goes on from a checkpoint of the other
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.eject.every_row

check: $(VENV)/.installed  ## format, lint, strict types, the code in the docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_docs.py

package: $(VENV)/.installed  ## build the wheel, install it into a clean environment, train with it
	rm -rf build/package && mkdir -p build/package
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/package .
	$(PYTHON) -m venv build/package/env || python3 -m venv build/package/env
	build/package/env/bin/python -m pip install --quiet --constraint constraints.txt torch build/package/*.whl
	build/package/env/bin/sheer --version
	cd build/package && env/bin/python ../../tests/packaged.py

snapshots: $(VENV)/.installed  ## write the ejected scripts of the tests anew; read what changed
	SHEER_WRITE_SNAPSHOTS=1 $(BIN)/python -m pytest -q tests/eject/test_snapshots.py

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
