# make demo: train, checkpoint, resume, generate.  make demo-parallel: with experts and stages.
# make test: all that CI runs on one Python.
PYTHON ?= python3
VENV ?= .venv
# More requirements for every installation, for example PINS="jax==0.11.2".
PINS ?=
PYTEST_ARGS ?=
# Of the CUDA plugin; that of the jax installed.
CUDA_JAX ?= 0.11.2

# Modules are compiled when first imported: most of what is installed never is.
PIP_INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile

.PHONY: venv demo demo-parallel test parity notebooks lint aot clean

venv: $(VENV)/.core

$(VENV)/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("whalejax needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e . $(PINS)
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.core
	$(PIP_INSTALL) -e '.[test]' $(PINS)
	@touch $@

$(VENV)/.torch: pyproject.toml | $(VENV)/.test
	$(PIP_INSTALL) -e '.[test,torch]' $(PINS)
	@touch $@

demo: venv
	$(VENV)/bin/whalejax demo

# On eight devices of one CPU.
demo-parallel: venv
	JAX_PLATFORMS=cpu $(VENV)/bin/python examples/train_parallel.py

test: $(VENV)/.test
	$(VENV)/bin/pytest -n 2 $(PYTEST_ARGS)

# Against transformers' DeepSeek models in PyTorch on the CPU.
parity: $(VENV)/.torch
	$(VENV)/bin/pytest tests/parity $(PYTEST_ARGS)

notebooks: $(VENV)/.test
	$(VENV)/bin/pytest --nbmake --nbmake-timeout=300 notebooks $(PYTEST_ARGS)

# JAX's CUDA plugin, to compile for GPUs on a machine without one; in a folder of its own, where
# only the tests find it that ask for it.
aot: $(VENV)/cuda

$(VENV)/cuda: | $(VENV)/.test
	$(PIP_INSTALL) --no-deps --target $@.tmp jax-cuda13-plugin==$(CUDA_JAX) \
	  jax-cuda13-pjrt==$(CUDA_JAX) nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
	mv $@.tmp $@

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf .venv .venv312 build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
