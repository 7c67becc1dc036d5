# `make quickstart` needs Python 3.10+ and nothing else; every target makes what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# A machine with a GPU brings its own torch: TORCH= leaves the choice to pip.
TORCH ?= torch==2.13.0
WORKERS ?= 2
export PYTHONUNBUFFERED := 1
# Container images often forbid Python to keep its byte code; every start would then compile 4,000 modules, for 7 s.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart install test gpu-fake-36 faults check format equivalence plan chaos slurm hosts bench-quick gpu-dry-run clean

# The versions that were tested together; another torch is the user's own choice, so then nothing is pinned.
CONSTRAINTS := $(if $(filter torch==2.13.0,$(TORCH)),-c constraints.txt)

$(VENV)/.base: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing ft_dist (a minute or two) ..."
	$(PIP) install --no-compile "setuptools>=69,<82" wheel ninja $(TORCH)
	$(PIP) install --no-compile --no-build-isolation $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install --no-compile --no-build-isolation $(CONSTRAINTS) -e ".[dev,triton]"
	touch $@

install: $(VENV)/.dev

quickstart: $(VENV)/.base
	$(BIN)/ft-dist fetch smollm2-135m
	$(BIN)/ft-dist train quickstart --nproc 2

# GPU machines bring Triton 3.6.0, so the kernels are compiled with it too. A network that does not deliver its 190 MB
# leaves those tests out, and they say so.
TRITON_36 := $(VENV)/triton-3.6.0
$(TRITON_36)/.done: $(VENV)/.dev
	@echo "fetching triton 3.6.0, which GPU machines have (190 MB, once) ..."
	if $(PIP) install --no-compile --no-deps --upgrade --target $(TRITON_36) triton==3.6.0; then touch $@; \
	else echo "triton 3.6.0 did not arrive: make gpu-fake-36 tries again"; fi

gpu-fake-36: $(TRITON_36)/.done
	$(BIN)/python -m pytest -n $(WORKERS) tests/gpu_fake -k triton_of_gpu_machines

test: $(VENV)/.dev $(TRITON_36)/.done
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not faults and not gpu"

# preemption, hangs, object stores that fail, twelve kills: end to end, and so by themselves
faults: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "faults and not slow"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=kernels $(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# every method, stage, world size and micro-batch against a plain PyTorch loop; every stage killed and resumed;
# checkpoints that DeepSpeed itself wrote, imported
equivalence: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow tests/e2e/test_equivalence.py tests/e2e/test_resume.py tests/checkpoint

# the plan of memory against the tensors of 24 real runs, DeepSpeed's own among them (ten minutes on two cores)
plan: $(VENV)/.dev
	$(BIN)/ft-dist fetch smollm2-135m
	FT_DIST_TEST_CACHE=$${FT_DIST_CACHE:-$$HOME/.cache/ft_dist} $(BIN)/python -m pytest -q -s -m slow tests/plan

# 200 kills at random instants (KILLS=N SEED=N for others); `make faults` takes 12
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos.storm $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

# jobs of a real SLURM (installed with apt-get if missing) that are preempted, out of time, requeued or lose a node
slurm: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow tests/launcher/targets/test_slurm.py tests/launcher/test_docs.py

# three hosts in network namespaces, their links cut and slow: needs root (`make faults` kills and adds agents)
hosts: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow tests/launcher/elastic/test_hosts.py

# a guard against getting slower: ratios to Hugging Face + PEFT, kept in benchmarks/results/ (under three minutes)
bench-quick: $(VENV)/.dev
	$(BIN)/python -m benchmarks.training.quick

# the stages of benchmarks/gpu.sh on CPU with tiny shapes: would a GPU machine run them? (a minute; `make test` runs it too)
gpu-dry-run: $(VENV)/.dev
	PYTHON=$(BIN)/python OUT=$${OUT:-/tmp/ft_dist-gpu} benchmarks/gpu.sh --dry-run

clean:
	rm -rf runs .cache build *.egg-info
