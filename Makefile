PYTHON ?= python3
VENV ?= .venv
# Empty (make CONSTRAINTS=) takes the newest torch and torchvision instead.
CONSTRAINTS ?= constraints.txt
OUT ?= runs/digits
# A worker takes a gigabyte of memory.
PYTEST_SPREAD ?= -n logical --maxprocesses 8 --dist worksteal

PIP = $(VENV)/bin/pip --disable-pip-version-check
BUILD_INPUTS = setup.py pyproject.toml $(CONSTRAINTS) \
	$(wildcard build_backend/*.py csrc/*.h csrc/*/*)

.PHONY: train test lint docs ptx-check gpu-check clean

# Where the development environment stands, it serves.
train: $(firstword $(wildcard $(VENV)/train,dev.stamp) $(VENV)/train.stamp)
	$(VENV)/bin/czm-train --out $(OUT) --overwrite

test: $(VENV)/train,dev.stamp
	$(VENV)/bin/pytest $(PYTEST_SPREAD)

lint: $(VENV)/train,dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/train,dev.stamp
	$(VENV)/bin/mkdocs build --strict

# Everything about GPU kernels that a CPU can show, also what `make test` leaves out. Needs torch, and
# nvcc or Triton, in its own Python, and takes twenty minutes of one processor.
ptx-check:
	$(PYTHON) -m pytest -m 'simulated or exhaustive' tests/ops tests/ptx tests/cuda_on_host

# On a machine with a GPU and with torch, in its own Python: nothing is fetched. PART=first runs one
# part, which ends within nine minutes.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(PART:%=--part %)

# The stamp's name is the list of extras installed. torch comes first, so that the build finds it
# and fetches none of its own. Editable, so that tests and training run this tree.
$(VENV)/%.stamp: $(BUILD_INPUTS) | $(VENV)
	$(PIP) install $(CONSTRAINTS:%=-c %) torch torchvision
	$(PIP) install $(CONSTRAINTS:%=-c %) -e '.[$*]'
	touch '$@'

$(VENV):
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist site runs *.egg-info czm_fused/_C_*.so
	rm -rf .pytest_cache .hypothesis .ruff_cache .mypy_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
