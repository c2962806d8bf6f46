# Plain verbs; `make` alone lists them. Everything runs in a virtual environment that the first verb makes.

PYTHON ?= python3
# What to install as torch, e.g. TORCH="torch==2.13.0". Empty: .ci/install-torch looks for a GPU and chooses.
TORCH ?=
# Test processes, and further arguments for pytest: make test ARGS="-k rope -x"
JOBS ?= 2
ARGS ?=
# For make bench: a folder of texts to measure quality on (benchmarks/README.md), and where what is not kept goes.
CORPUS ?=
WORK ?= runs/bench

VENV := .venv
VENV_LOWEST := .venv-lowest
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-lowest test-third-party bench lint format clean FORCE
export TORCH

help:
	@echo 'make VERB, where VERB is one of'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  %-14s %s\n", $$1, $$2 }'
	@echo 'Variables: PYTHON (the interpreter, now $(PYTHON)), TORCH (e.g. "torch==2.13.0"; empty: CPU or GPU build by itself),'
	@echo '           JOBS (test processes, now $(JOBS)), ARGS (for pytest, e.g. ARGS="-k rope"), CORPUS (a folder, for bench)'

demo: $(VENV)/.installed ## extend a small model's context on this machine, offline
	$(BIN)/hf-longlora demo

test: $(VENV)/.installed ## the default suite: CPU, offline (the slow and the third-party tests are left out)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-lowest: $(VENV_LOWEST)/.installed ## the default suite with the oldest dependencies we support
	$(VENV_LOWEST)/bin/python -m pytest -n $(JOBS) $(ARGS)

# PEFT's sdist carries its tests; they are unpacked beside the environment and never committed.
test-third-party: $(VENV)/.installed ## PEFT's own suite for custom models, with our adapter in the place of LoRA
	$(BIN)/python -m pip install -qq --disable-pip-version-check parameterized
	rm -rf $(VENV)/peft && mkdir $(VENV)/peft
	$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: -d $(VENV)/peft \
		"peft==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("peft"))')"
	tar -xzf $(VENV)/peft/peft-*.tar.gz -C $(VENV)/peft --strip-components 1
	touch $(VENV)/peft/tests/__init__.py # the sdist leaves it out
	cd $(VENV)/peft && PYTHONPATH=$(CURDIR)/tests/third_party HF_HUB_OFFLINE=1 $(CURDIR)/$(BIN)/python -m pytest -o addopts= -q -n $(JOBS) \
		-p longlora_for_lora -p no:warnings tests/test_custom_models.py \
		-k "-LoraConfig- or (lora and not Config)" $(ARGS)

# Results of a GPU are kept (benchmarks/results); those of a CPU show no more than that the scripts run.
bench: $(VENV)/.installed ## what this machine can measure: attention, a training step, with CORPUS=DIR quality
	@set -e; if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then set -x; \
		$(BIN)/python -m benchmarks.attention; \
		for preset in targets lengths fused longest; do $(BIN)/python -m benchmarks.train_step --preset $$preset; done; \
		$(BIN)/python -m benchmarks.plots; \
	else echo 'No GPU: the smallest shape, into $(WORK)'; set -x; \
		$(BIN)/python -m benchmarks.train_step --preset tiny --results $(WORK)/train_step.csv; \
		$(BIN)/python -m benchmarks.plots --model tiny --results $(WORK)/train_step.csv --plot $(WORK)/train_step.png; fi
	@[ -z '$(CORPUS)' ] || $(BIN)/python -m benchmarks.quality.run --corpus '$(CORPUS)' --work '$(WORK)'

lint: $(VENV)/.installed ## ruff check, ruff format --check, mypy
	@status=0; for check in 'ruff check .' 'ruff format --check .' mypy; do \
		echo "$$check"; $(BIN)/$$check || status=1; done; exit $$status

format: $(VENV)/.installed ## rewrite the code as lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environments, caches and build outputs
	rm -rf $(VENV) $(VENV_LOWEST) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is brought up to date when pyproject.toml or its constraints change, or TORCH names another torch than last time.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'hf-longlora needs Python 3.10 or newer, and PYTHON=$(PYTHON) is not: make ... PYTHON=python3.12' >&2; exit 1; }
	@[ -x $(@D)/bin/python ] || $(PYTHON) -m venv $(@D)
	@rm -f $@
	.ci/install-torch $(@D)/bin/python $(1)
	$(@D)/bin/python -m pip install -qq --disable-pip-version-check --editable '.[dev]' $(2) || \
		$(@D)/bin/python -m pip install --editable '.[dev]' $(2) # once more, aloud: quiet, pip names no conflict
	@printf '%s' "$$TORCH" > $@
endef

ifneq ($(strip $(TORCH)),)
ifneq ($(strip $(TORCH)),$(strip $(shell cat $(VENV)/.installed 2>/dev/null)))
$(VENV)/.installed: FORCE
endif
ifneq ($(strip $(TORCH)),$(strip $(shell cat $(VENV_LOWEST)/.installed 2>/dev/null)))
$(VENV_LOWEST)/.installed: FORCE
endif
endif

$(VENV)/.installed: pyproject.toml .ci/install-torch
	$(call install)

$(VENV_LOWEST)/.installed: pyproject.toml .ci/install-torch requirements/lowest.txt
	$(call install,lowest,--constraint requirements/lowest.txt)
