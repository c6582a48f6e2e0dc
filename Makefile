# make demo   the whole path on a small policy and real photographs
# make test   the tests
# Both first make a virtual environment in .venv from pyproject.toml's pins.
PYTHON ?= python3
BIN := .venv/bin
WORK ?= build/demo

.PHONY: demo test
demo: .venv/installed
	mkdir -p $(WORK)
	$(BIN)/python tools/make_checkpoint.py --variant tiny --robot libero --out $(WORK)/checkpoint
	$(BIN)/python tools/demo.py observations $(WORK)/observations.npz
	$(BIN)/duq-compile $(WORK)/checkpoint --robot libero --calibration $(WORK)/observations.npz --out $(WORK)/engine.plan
	$(BIN)/duq-inspect $(WORK)/engine.plan
	$(BIN)/python tools/demo.py run $(WORK)/checkpoint $(WORK)/engine.plan $(WORK)/observations.npz

test: .venv/installed
	$(BIN)/python -m pytest

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
