# `make quickstart` needs Python 3.10+ and nothing else; every target builds what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# On a machine with a GPU, TORCH=torch lets pip choose the build.
TORCH ?= torch==2.13.0
WORKERS ?= 2
export PYTHONUNBUFFERED := 1
# Container images often stop Python from writing its byte code; every start would then compile 4,000 modules, for 7 s.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart install test gpu-fake-36 faults faults-short check format equivalence families plan chaos faults-matrix fuzz slurm hosts bench-quick gpu-dry-run wheel lock audit docs clean

# The versions that were tested together, with the hashes of their files; `make lock` writes them. With another torch,
# nothing is pinned. Torch itself is pinned because an open range downloads gigabytes of CUDA packages, even on a machine
# without a GPU.
LOCKED := $(filter torch==2.13.0,$(TORCH))
LOCKS := $(addprefix requirements/,build.lock base.lock dev.lock)
HASHED := install --no-compile --require-hashes --no-deps --no-build-isolation -r

$(VENV)/.base: pyproject.toml setup.py $(LOCKS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing ft_dist (a minute or two) ..."
	$(PIP) $(if $(LOCKED),$(HASHED) requirements/build.lock,install --no-compile "setuptools>=69,<82" wheel ninja)
	$(PIP) install --no-compile $(TORCH)
	$(if $(LOCKED),$(PIP) $(HASHED) requirements/base.lock)
	$(PIP) install --no-compile --no-build-isolation $(if $(LOCKED),--no-deps) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) $(if $(LOCKED),$(HASHED) requirements/dev.lock,install --no-compile --no-build-isolation -e ".[dev,triton]")
	touch $@

$(VENV)/constraints.txt: $(LOCKS)
	sed -n 's/^\([a-z0-9._-]*==[^\\]*[^\\ ]\) *\\$$/\1/p' $(LOCKS) >$@

install: $(VENV)/.dev

quickstart: $(VENV)/.base
	$(BIN)/ft-dist fetch smollm2-135m
	$(BIN)/ft-dist train quickstart --nproc 2

# GPU machines have Triton 3.6.0, so the kernels are also compiled with it. Without a network to download its 190 MB, those
# tests are skipped with that reason.
TRITON_36 := $(VENV)/triton-3.6.0
$(TRITON_36)/.done: $(VENV)/.dev
	@echo "downloading triton 3.6.0, the version of GPU machines (190 MB, once) ..."
	if $(PIP) install --no-compile --no-deps --upgrade --target $(TRITON_36) triton==3.6.0; then touch $@; \
	else echo "triton 3.6.0 could not be downloaded: make gpu-fake-36 tries again"; fi

gpu-fake-36: $(TRITON_36)/.done
	$(BIN)/python -m pytest -n $(WORKERS) tests/gpu_fake -k triton_of_gpu_machines

test: $(VENV)/.dev $(TRITON_36)/.done
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=40 -m "not slow and not faults and not gpu"

# end to end: preemption, hangs, failing object stores, twelve kills, and the commands of the docs
faults: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=40 -m "faults and not slow"

# the part of `make faults` that CI has time for: kills, preemption, a selection of the matrix, resume rules, trust
SHORT := chaos faults checkpoint/test_resume_rule.py result/test_trust.py run \
	launcher/elastic/test_kills.py::test_a_killed_worker_is_restarted_and_no_bit_changes \
	launcher/elastic/test_kills.py::test_a_killed_agent_shrinks_the_world_and_a_new_one_grows_it \
	e2e/test_preemption.py::test_two_notices_count_once_and_reach_every_rank_from_one \
	e2e/test_preemption.py::test_a_signal_in_a_commit_finishes_it_and_a_second_keeps_the_commit_before \
	e2e/test_mirror.py preflight/test_planted_faults.py::test_another_version_on_one_node
faults-short: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=40 -m "faults and not slow" $(addprefix tests/,$(SHORT))

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=kernels $(BIN)/lint-imports
	$(BIN)/python requirements/audit.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# every method, stage, world size and micro-batch against a plain PyTorch loop; every stage killed and resumed;
# imports of DeepSpeed's own checkpoints
equivalence: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow tests/e2e/test_equivalence.py tests/e2e/test_resume.py tests/checkpoint

# every architecture through check, training, evaluation and export, against plain transformers and peft
families: $(VENV)/.dev
	PYTHONPATH=.:kernels $(BIN)/python -m tests.families $(NAMES)

# compares planned memory with the tensors of 24 real runs, DeepSpeed's included (ten minutes on two cores)
plan: $(VENV)/.dev
	$(BIN)/ft-dist fetch smollm2-135m
	FT_DIST_TEST_CACHE=$${FT_DIST_CACHE:-$$HOME/.cache/ft_dist} $(BIN)/python -m pytest -q -s -m slow tests/plan

# 200 kills at random instants (KILLS=N SEED=N change that); `make faults` runs 12
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos.storm $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

# at least 40 kinds of fault, each injected into a real run: nothing may be lost (half an hour on two cores)
faults-matrix: $(VENV)/.dev
	$(BIN)/python -m tests.faults $(KINDS)

# 10,000 random inputs per target (config, data files, commits, stores, model folders, the wire); CI tries 40
fuzz: $(VENV)/.dev
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-10000} $(BIN)/python -m pytest -q -n $(WORKERS) tests/fuzz

# jobs on a real SLURM (installed with apt-get if missing) that are preempted, run out of time, are requeued or lose a node
slurm: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow tests/launcher/targets/test_slurm.py tests/docs/test_commands.py

# three hosts in network namespaces, with cut and slow links: needs root (`make faults` kills and adds agents)
hosts: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow tests/launcher/elastic/test_hosts.py

# guards against regressions: ratios to Hugging Face + PEFT, kept in benchmarks/results/ (under three minutes)
bench-quick: $(VENV)/.dev
	$(BIN)/python -m benchmarks.training.quick

# runs the stages of benchmarks/gpu.sh on CPU with tiny shapes (a minute; `make test` does it too)
gpu-dry-run: $(VENV)/.dev
	PYTHON=$(BIN)/python OUT=$${OUT:-/tmp/ft_dist-gpu} benchmarks/gpu.sh --dry-run

# builds the wheel, installs it into an empty environment outside the tree and trains `smoke` there (a minute)
wheel: $(VENV)/.base $(VENV)/constraints.txt
	rm -rf build dist *.egg-info
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build *.egg-info
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(PYTHON) -m venv $$folder/venv && \
	$$folder/venv/bin/python -m pip --disable-pip-version-check --quiet install --no-compile $(if $(LOCKED),-c $(VENV)/constraints.txt) $(TORCH) dist/*.whl && \
	cd $$folder && env -u PYTHONPATH FT_DIST_CACHE=$$folder/cache venv/bin/ft-dist train smoke

# resolves pyproject.toml again and writes requirements/*.lock (UPGRADE=--upgrade takes the newest versions)
lock: $(VENV)/.base
	requirements/lock.sh $(TORCH) $(UPGRADE)

# compares the locked versions with published advisories; says so if no database can be reached
audit: $(VENV)/.dev
	$(BIN)/python requirements/audit.py

# rewrites the generated pages: the reference from the code, the tables from benchmarks/results/
docs: $(VENV)/.base
	PYTHONPATH=.:kernels $(BIN)/python docs/generate.py
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf runs .cache build dist *.egg-info
