# Every target creates the virtual environment it needs, and reinstalls it when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off

.PHONY: demo test test-cpu test-pytorch-lightning lint docs notebooks gpu compat newest clean

# One thread: more threads slow down such a small network, and make its latencies noisy.
demo: $(VENV)/.demo  ## train and prune on the digits
	OMP_NUM_THREADS=1 $(BIN)/lightning-prune fit --config digits_mlp_contribution

test: lint  ## everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Other processors round differently: these are their kernels, without vector instructions and with AVX2.
test-cpu: $(VENV)/.dev  ## the tests with the kernels of other processors
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-pytorch-lightning: $(VENV)/.dev  ## the tests of callbacks in runs of the other Lightning package
	LIGHTNING_PACKAGE=pytorch_lightning OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/callbacks

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## docs/_build/index.html
	rm -rf docs/api/generated  # pages of names that may be gone
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

# Real data: downloaded into the cache folder, or read from LIGHTNING_PRUNE_DATA. Some with TUTORIALS="masks study".
notebooks: $(VENV)/.docs  ## runs docs/tutorials again, at full size
	OMP_NUM_THREADS=1 $(BIN)/python docs/run_notebooks.py $(TUTORIALS)

gpu: $(VENV)/.dev  ## docs/evidence/gpu, on a machine with a GPU; continues a stopped run
	$(BIN)/python -m benchmarks.gpu --resume

# Old packages give warnings that this package cannot fix, so warnings are not errors here.
compat: .venv-oldest/.oldest  ## the tests on the oldest supported versions
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -W default -n 2 --dist worksteal

newest: .venv-newest/.newest  ## the tests on the newest versions
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -W default -n 2 --dist worksteal

clean:  ## remove environments and caches; keeps runs/
	rm -rf .venv .venv-oldest .venv-newest docs/_build docs/api/generated build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[digits,plot,wandb]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[docs]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Ignores a limit on torch in the machine's pip configuration.
.venv-newest/.newest: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	PIP_CONSTRAINT=/dev/null .venv-newest/bin/python -m pip --disable-pip-version-check install --progress-bar off -U -e '.[dev]' torch torchvision
	touch $@

# With uv, because pip cannot resolve to the lowest versions that pyproject.toml allows.
.venv-oldest/.oldest: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --progress-bar off uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct -e '.[dev]'
	touch $@
