# `make help` lists the targets. PYTHON names the interpreter that makes .venv (3.11 or newer).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PEER := $(VENV)/.peer
KERNELS := $(VENV)/.kernels
CORPUS := data/python-docs

# For ninja, which DeepSpeed calls by name to build its operators, and for `python` in the recipes.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Operators are built once for this checkout. A build that was killed leaves a lock for which every later start would
# wait forever; a lock that is there when a recipe begins is such a one.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
CLEAR_LOCKS = @mkdir -p "$$TORCH_EXTENSIONS_DIR" && find "$$TORCH_EXTENSIONS_DIR" -name lock -delete
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Whole files side by side, as tests of a file share fixtures; in the order of collection, so that the longest, which
# start whole runs and wait for them, come first.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help setup corpus demo test test-cluster test-browser test-container test-gpu lint bench profile chaos evidence
.PHONY: clean paper-gpt2 paper-qwen3 paper-width paper-pretraining paper-families

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv and install the package, its pinned dependencies and the development tools

# torch first, and with its pin: DeepSpeed is built from source against the torch that is there, and torchvision would
# else bring a newer one. DS_BUILD_OPS=0: operators are built where they are first used, on the machine that runs them.
$(STAMP): pyproject.toml constraints.txt
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || rm -rf $(VENV) # none yet, or its making was cut short
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'PYTHON: $(PYTHON) is not there or older than 3.11. Use make setup PYTHON=python3.12, say.' >&2; exit 1; }
	test -d $(VENV) || "$(PYTHON)" -m venv $(VENV)
	python -m pip install --quiet -c constraints.txt torch numpy
	python -m pip install --quiet -c constraints.txt setuptools wheel packaging ninja psutil py-cpuinfo
	DS_BUILD_OPS=0 python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# The package whose figures a test and a benchmark compare with ours. It is no dependency: its licence is
# non-commercial, and it asks for an older transformers than the pinned one, with which it works as well.
$(PEER): $(STAMP)
	python -m pip install --quiet --no-deps embedding-condensation==2.0
	@touch $@

# Liger's kernels and Triton, whose interpreter runs them without a GPU: 1 GB beside the environment, not in it, as torch
# and DeepSpeed take other paths where they find Triton.
$(KERNELS): $(STAMP)
	python -m pip install --quiet --no-deps -c constraints.txt --upgrade --target $(VENV)/kernels liger-kernel triton==3.9.0
	@touch $@

corpus: $(CORPUS)/corpus.json ## tokenize the documentation that Python carries into data/python-docs

$(CORPUS)/corpus.json: | $(STAMP)
	python data_prep/tokenize_to_mds.py --source python-docs --tokenizer train:8192 --seq-len 256 --out $(CORPUS)

# Two processes: one per GPU where there are GPUs, or one if there is only one. OMP_NUM_THREADS: each process would else
# start a thread for every core, and they would push each other off the cores. A free port for each launch, so that two
# demos on one machine do not meet. The evaluation jobs that training started run beside it: asking for their results
# waits for them.
demo: corpus ## train a small model without and with the dispersion loss; ends with a page that compares them
	$(CLEAR_LOCKS)
	@read -r processes threads < <(python -c 'import os, torch; n = min(torch.cuda.device_count(), 2) or 2; \
		print(n, max(1, len(os.sched_getaffinity(0)) // n))'); \
	for run in demo_baseline demo; do \
		port=$$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'); \
		OMP_NUM_THREADS=$$threads deepspeed --num_gpus $$processes --master_port $$port \
			launch/pretrain.py --config configs/$$run.yaml; \
	done
	@for run in demo_baseline demo; do \
		python launch/evaluate_checkpoint.py --model runs/$$run --suite configs/eval/offline.yaml; \
	done
	@python launch/report.py runs/demo_baseline runs/demo --out "$$PWD/runs/demo/report.html"

test: setup $(PEER) $(KERNELS) ## all tests that need neither a GPU nor a cluster
	$(CLEAR_LOCKS)
	python -m pytest $(SIDE_BY_SIDE) --durations 25

test-cluster: setup ## the tests with a real Slurm and several hosts on this machine (root; installs Debian's packages)
	$(CLEAR_LOCKS)
	python -m pytest -m "cluster and not container" tests/cluster --durations 0

test-browser: setup ## open pages in a headless Chromium (root; installs Debian's package)
	python -m pytest -m browser tests/browser

test-container: setup ## build the CPU image and train in it (root, minutes; installs buildah and podman from Debian)
	python -m pytest -m container tests/cluster

test-gpu: setup ## the tests that need a GPU, and the figures of training on it (installs the extra gpu)
	python -m pip install --quiet --no-deps -c constraints.txt liger-kernel
	python -m pytest -m gpu tests/gpu
	PYTHONPATH=.:tests python tests/benchmarks/bench_gpu.py

lint: setup ## ruff, mypy, and the linters of shell scripts and of the Dockerfile
	ruff check .
	ruff format --check .
	mypy
	shellcheck .ci/run
	hadolint docker/Dockerfile

bench: setup $(PEER) ## print the tables of tests/benchmarks (minutes; no result passes or fails)
	$(CLEAR_LOCKS)
	@for benchmark in tests/benchmarks/bench_*.py; do \
		echo "== $$benchmark"; PYTHONPATH=.:tests python "$$benchmark"; \
	done

# CONFIG and SETTINGS profile another run: make profile CONFIG=configs/x.yaml SETTINGS='training.max_tokens=...'.
CONFIG ?= configs/demo.yaml
SETTINGS ?= training.max_tokens=102400 schedule.warmup_tokens=0 evaluation.every=null checkpoint.every_steps=null
profile: corpus ## train a few steps of the demo and print where their time goes; a trace for Perfetto or TensorBoard
	$(CLEAR_LOCKS)
	@rm -rf runs/profile
	deepspeed launch/pretrain.py --config $(CONFIG) run.name=profile run.folder=runs/profile profiling.steps=5 $(SETTINGS)

# CHAOS_SEED=... repeats the kills of a run that printed it.
chaos: setup ## kill a run at 50 random moments and at every write of a save, and print what came of it (half an hour)
	$(CLEAR_LOCKS)
	CHAOS_FULL=1 python -m pytest --capture=no -m '' tests/chaos -k kills

# The paper's experiments, on the GPUs of this node. ARMS and SEEDS choose some: make paper-gpt2 ARMS='ce dispersion'
# SEEDS=0. EVAL is given to each evaluation: EVAL='--datasets mirror'. What is finished is left alone, what was cut short
# goes on. What fails is named in the end, and keeps no other from running. The second argument of paper_runs is a
# published model, which is evaluated as it is beside those that were trained on from it.
SEEDS ?= 0 1 2
EVAL ?=
PAPER_SUITE := configs/eval/paper.yaml
PAPER_ARMS = $(patsubst configs/paper/$(1)_%.yaml,%,$(wildcard configs/paper/$(1)_*.yaml))
define paper_runs
@failed=; for arm in $(or $(ARMS),$(call PAPER_ARMS,$(1))); do for seed in $(SEEDS); do \
	run=$(1)_$$arm-s$$seed; \
	deepspeed launch/pretrain.py --config configs/paper/$(1)_$$arm.yaml \
		run.seed=$$seed run.name=$$run run.folder=runs/paper/$$run \
		|| { failed="$$failed $$run:training"; continue; }; \
	python launch/evaluate_checkpoint.py --model runs/paper/$$run --suite $(PAPER_SUITE) $(EVAL) \
		|| failed="$$failed $$run:evaluation"; \
done; done; \
$(if $(2),python launch/evaluate_checkpoint.py --model $(2) --suite $(PAPER_SUITE) --out runs/paper/$(1)-untouched \
	$(EVAL) || failed="$$failed $(2):evaluation";) \
python launch/report.py runs/paper/$(1)_*/ --out runs/paper/$(1).html || failed="$$failed report"; \
if [ -n "$$failed" ]; then echo "failed:$$failed; the same command tries again" >&2; exit 1; fi
endef

paper-gpt2: data/wikitext103-gpt2/corpus.json ## mid-train GPT2 on wikitext-103: each baseline and each form of the loss
	$(call paper_runs,gpt2,openai-community/gpt2)

paper-qwen3: data/wikitext103-qwen3/corpus.json ## the same for Qwen3-0.6B
	$(call paper_runs,qwen3,Qwen/Qwen3-0.6B)

paper-width: data/fineweb-edu/corpus.json ## GPT2's shape from scratch with four widths of the MLP
	$(call paper_runs,width)

data/wikitext103-gpt2/corpus.json: | $(STAMP)
	python data_prep/tokenize_to_mds.py --recipe configs/data/wikitext103.yaml --out $(@D)

data/wikitext103-qwen3/corpus.json: | $(STAMP)
	python data_prep/tokenize_to_mds.py --recipe configs/data/wikitext103.yaml --tokenizer Qwen/Qwen3-0.6B --out $(@D)

data/fineweb-edu/corpus.json: | $(STAMP)
	python data_prep/tokenize_to_mds.py --recipe configs/data/fineweb_edu.yaml --out $(@D)

paper-pretraining: setup ## submit Qwen3-0.6B on C4, without and with the loss, to Slurm; SUBMIT='--partition P --time T ...'
	python launch/submit_slurm.py --config configs/paper/c4_ce.yaml configs/paper/c4_dispersion.yaml \
		--nodes 80 --gpus-per-node 8 $(SUBMIT)

paper-families: setup ## measure condensation over GPT2, Qwen and Bloom on wikitext
	@failed=; for family in configs/paper/families_*.txt; do \
		name=$$(basename "$$family" .txt); \
		python launch/measure_condensation.py $$(sed 's/#.*//' "$$family") --dataset wikitext --repetitions 100 \
			--max-length 512 --precision bf16 --out "runs/paper/$$name" || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed; the same command tries again" >&2; exit 1; fi

evidence: setup ## train, evaluate and compare what tests/evidence lists (2 CPU cores: 1.5 to 3 hours)
	$(CLEAR_LOCKS)
	PYTHONPATH=.:tests python tests/evidence/train.py
	PYTHONPATH=.:tests python tests/evidence/compare.py

clean: ## remove .venv and all caches; data/ and runs/ stay
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . \( -path ./data -o -path ./runs -o -path ./.git \) -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
