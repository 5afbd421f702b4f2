# Each target installs its requirements into .venv on its first call; later calls start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle OpenMP threads must sleep: spinning threads nearly stop a run if processes share cores.
export OMP_WAIT_POLICY = passive
export TOKENIZERS_PARALLELISM = false

# One process per GPU, or one on the CPU with a thread per core. Plain `accelerate launch` does the same; explicit options
# keep it from warning about its defaults.
PROCESSES = $$($(BIN)/python -c "import torch; print(max(1, torch.cuda.device_count()))")
THREADS = $$(getconf _NPROCESSORS_ONLN)
LAUNCH = $(BIN)/accelerate launch --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_processes $(PROCESSES) --num_cpu_threads_per_process $${OMP_NUM_THREADS:-$(THREADS)}

# Distribute by file, so that a file's shared fixtures (a launch of several processes, a trained run) are made once.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-slow lint help-table docs real-check clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP)  ## create .venv and install the tested versions

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make needs Python 3.11 or newer for \
	constraints.txt, but $(PYTHON) is older. Run 'make PYTHON=python3.11 ...', or install without it: pip install -e ."; \
	exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

# If a run has its cores to itself, letting threads spin briefly before they sleep makes it a fifth faster.
demo: $(STAMP)  ## improve the embedded text-to-video model, in about four minutes on two CPU cores
	env -u OMP_WAIT_POLICY GOMP_SPINCOUNT=20000 $(LAUNCH) examples/train_t2v.py --config recipes/shapemotion_rvm.yaml $(ARGS)

test: $(STAMP)  ## run the tests
	$(PYTEST) $(ARGS)

test-slow: $(STAMP)  ## run all tests, including the slow ones
	$(PYTEST) -m "slow or not slow" $(ARGS)

lint: $(STAMP)  ## check style, format and the types of the public modules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

help-table: $(STAMP)  ## write the table of options that --help prints, after a change to a setting
	$(BIN)/python -m pisces_rl.cli.help_table

# The site needs only the extra `docs`: it reads the sources without importing them, so torch is not needed.
DOCS = $$($(BIN)/python -c "import configparser as c; p = c.ConfigParser(); p.read('setup.cfg'); \
	print(*p['options.extras_require']['docs'].split())")

$(VENV)/.docs: setup.cfg constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(DOCS)
	@touch $@

docs: $(VENV)/.docs  ## build the documentation site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

real-check: $(STAMP)  ## run a short GRPO run of Wan 2.1 1.3B and print its measurements (needs a GPU and the Hub)
	$(BIN)/python benchmarks/real_check.py $(ARGS)

clean:  ## remove caches and build files; .venv and outputs/ stay
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info $(STAMP) $(VENV)/.docs
	find src tests examples benchmarks assets_src -name __pycache__ -type d -exec rm -rf {} + 2>/dev/null || true
