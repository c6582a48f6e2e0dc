# make demo   the whole path on a small policy and real photographs
# make test   the tests
# Both first make a virtual environment in .venv from pyproject.toml's pins.
PYTHON ?= python3
BIN := .venv/bin
WORK ?= build/demo

.PHONY: demo test
demo: .venv/installed
	rm -rf $(WORK)/checkpoint && mkdir -p $(WORK)
	$(BIN)/python tools/make_checkpoint.py --variant tiny --robot libero --out $(WORK)/checkpoint
	$(BIN)/python tools/demo.py observations $(WORK)/calibration.npz --count 8 --seed 0
	$(BIN)/python tools/demo.py observations $(WORK)/observations.npz --count 4 --seed 1
	$(BIN)/duq-compile $(WORK)/checkpoint --robot libero --calibration $(WORK)/calibration.npz --out $(WORK)/engine.plan
	$(BIN)/duq-inspect $(WORK)/engine.plan
	$(BIN)/python tools/demo.py run $(WORK)/engine.plan $(WORK)/observations.npz
	$(BIN)/python tools/compare.py $(WORK)/checkpoint $(WORK)/engine.plan --observations $(WORK)/observations.npz --report $(WORK)/report.html

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps openpi-client==0.1.2
	touch $@

# Runs LeRobot's published pi0 and pi0.5 (Python 3.12, about 5 GB) and renews tests/data/lerobot_actions.npz; compares duq's
# reading of a LeRobotDataset with LeRobot's own, and whole policies, from raw observations to the robot's actions.
PEER_PYTHON ?= python3.12
CASES := build/peer_cases
.PHONY: test-peers
test-peers: .venv/installed
	$(PEER_PYTHON) -m venv build/peers
	build/peers/bin/pip install --quiet -r tests/peers/requirements.txt
	build/peers/bin/python tests/peers/lerobot_actions.py
	build/peers/bin/python tests/peers/lerobot_dataset.py
	$(BIN)/python -m pytest tests/compiler/model/test_model_lerobot.py
	rm -rf $(CASES)
	$(BIN)/python tools/make_checkpoint.py --variant tiny --depth 1 --vision-depth 1 --out $(CASES)/tiny
	HF_HUB_OFFLINE=1 build/peers/bin/python tests/peers/lerobot_policies.py $(CASES)/tiny/tokenizer.model $(CASES)/policies
	$(BIN)/python tests/peers/check_policies.py $(CASES)/policies
