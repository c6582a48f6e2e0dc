# make demo           the whole path on a small policy and real photographs
# make test           the tests
# make test-all       and their slow variants
# make fuzz           bad inputs of every kind, 10 minutes
# make lint           ruff and mypy
# make test-install   the wheel, installed as a user does, every command of it
# make test-resolve   what users install resolves, on every Python
# make test-cuda12    kernels and plans by the compiler of CUDA 12
# make test-peers     against LeRobot's own code
# They make a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
WORK ?= build/demo
# Bytecode is kept, also where the environment says otherwise, as images of containers do: tests start hundreds of programs, and
# each would compile PyTorch's sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test
demo: .venv/installed
	rm -rf $(WORK)/checkpoint && mkdir -p $(WORK)
	$(BIN)/duq-make-checkpoint --variant tiny --robot libero --out $(WORK)/checkpoint
	$(BIN)/duq-demo observations $(WORK)/calibration.npz --count 8 --seed 0
	$(BIN)/duq-demo observations $(WORK)/observations.npz --count 4 --seed 1
	$(BIN)/duq-compile $(WORK)/checkpoint --robot libero --calibration $(WORK)/calibration.npz --out $(WORK)/engine.plan
	$(BIN)/duq-inspect $(WORK)/engine.plan
	$(BIN)/duq-demo run $(WORK)/engine.plan $(WORK)/observations.npz
	$(BIN)/duq-compare $(WORK)/checkpoint $(WORK)/engine.plan --observations $(WORK)/observations.npz --report $(WORK)/report.html

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal

# The same, and the variants that are marked slow.
.PHONY: test-all
test-all: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal -m ""

# Bad plans, manifests, observations, messages and files, from seeds: docs/reliability.md. Options: make fuzz FUZZ='manifest --share 0.1'
FUZZ ?=
.PHONY: fuzz
fuzz: .venv/installed
	mkdir -p build
	$(BIN)/python -m tests.fuzz --json build/fuzz.json $(FUZZ)

# mypy takes the folders of the checkout for duq's where they stand under duq/, as they do when installed: links do.
TYPES := build/types/duq
.PHONY: lint types test-install test-resolve
lint: .venv/installed types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	rm -rf $(TYPES) && mkdir -p $(TYPES)
	ln -s $(addprefix $(CURDIR)/,$(wildcard duq/*.py) compiler examples plugins runtime tools) $(TYPES)
	cd $(dir $(TYPES)) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml

test-install:
	$(PYTHON) tests/install/run.py

test-resolve: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/install/resolve.py

# Python compiles what is imported, once; pip would compile every file of every package.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps openpi-client==0.1.2
	touch $@

# With NVRTC and the bindings of CUDA 12 in front of those of .venv: compiles every kernel and whole tiny plans.
.PHONY: test-cuda12
test-cuda12: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --no-deps --target build/cuda12 \
		nvidia-cuda-nvrtc-cu12==12.6.85 cuda-bindings==12.9.5
	PYTHONPATH=build/cuda12 $(BIN)/python -m pytest -n auto -m "" tests/plugins/test_nvrtc.py tests/plugins/test_kernels.py \
		tests/compiler/targets/test_ptx.py tests/runtime/executors

# Runs LeRobot's published pi0 and pi0.5 (Python 3.12, about 5 GB) and renews tests/data/lerobot_actions.npz; compares duq's
# reading of a LeRobotDataset with LeRobot's own, and whole policies, from raw observations to the robot's actions. Then runs
# plans as LeRobot's policies in its own commands (integrations/), and docs/lerobot.md as it stands.
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
	$(BIN)/duq-make-checkpoint --variant tiny --depth 1 --vision-depth 1 --out $(CASES)/tiny
	HF_HUB_OFFLINE=1 build/peers/bin/python tests/peers/lerobot_policies.py $(CASES)/tiny/tokenizer.model $(CASES)/policies
	$(BIN)/python tests/peers/check_policies.py $(CASES)/policies
	build/peers/bin/pip install --quiet --editable . --editable integrations/lerobot_policy_duq
	for case in pi0 pi05 pi05_mean_and_std_relative; do \
		$(BIN)/duq-compile $(CASES)/policies/$$case/pretrained_model --quant none --out $(CASES)/exports/$$case --lerobot || exit; \
	done
	cd $(CASES) && $(CURDIR)/build/peers/bin/python -m pytest --noconftest -p no:cacheprovider $(CURDIR)/tests/peers/lerobot_plugin.py
	build/peers/bin/python tests/peers/replay_docs.py $(BIN) $(CASES)
