# Plain verbs; `make` alone lists them. Everything runs in a virtual environment that the first verb makes.

PYTHON ?= python3
# What to install as torch, e.g. TORCH="torch==2.13.0". Empty: .ci/install-torch looks for a GPU and chooses.
TORCH ?=
# Test processes, and further arguments for pytest: make test ARGS="-k rope -x"; for the demo: make demo ARGS=--full
JOBS ?= 2
ARGS ?=
# For make wheel-test, without ARGS: what a user sees.
SHOWN := tests/test_docs.py tests/test_examples.py tests/test_cli.py tests/test_data.py tests/test_imports.py
# For make bench: a folder of texts to measure quality on (benchmarks/README.md), and where what is not kept goes.
CORPUS ?=
# For make test-third-party: a checkout of TRL, where GitHub can't be reached.
TRL_SOURCE ?=
WORK ?= runs/bench

VENV := .venv
VENV_LOWEST := .venv-lowest
VENV_WHEEL := .venv-wheel
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-eval test-lowest test-third-party wheel-test bench docs lint format clean FORCE
export TORCH

help:
	@echo 'make VERB, where VERB is one of'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  %-14s %s\n", $$1, $$2 }'
	@echo 'Variables: PYTHON (the interpreter, now $(PYTHON)), TORCH (e.g. "torch==2.13.0"; empty: CPU or GPU build by itself),'
	@echo '           JOBS (test processes, now $(JOBS)), ARGS (for pytest, e.g. ARGS="-k rope"), CORPUS (a folder, for bench),'
	@echo '           TRL_SOURCE (a checkout, for test-third-party)'

demo: $(VENV)/.installed ## extend a small model's context on this machine, offline, in 4 minutes (ARGS=--full: the README's table)
	$(BIN)/hf-longlora demo $(ARGS)

test: $(VENV)/.installed ## the default suite: CPU, offline (the slow and the third-party tests are left out)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-lowest: $(VENV_LOWEST)/.installed ## the default suite with the oldest dependencies we support
	$(VENV_LOWEST)/bin/python -m pytest -n $(JOBS) $(ARGS)

# The sdists of PEFT and transformers carry tests; they are unpacked beside the environment and never committed.
define sdist
	rm -rf $(VENV)/$(1) && mkdir $(VENV)/$(1)
	$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: -d $(VENV)/$(1) \
		"$(1)==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("$(1)"))')"
	tar -xzf $(VENV)/$(1)/$(1)-*.tar.gz -C $(VENV)/$(1) --strip-components 1
	touch $(VENV)/$(1)/tests/__init__.py # the sdists leave it out
endef
OTHERS_PYTEST = HF_HUB_OFFLINE=1 HF_HUB_CACHE=$(CURDIR)/$(VENV)/hub PYTHONPATH=$(CURDIR)/tests/third_party:$(CURDIR) \
	$(CURDIR)/$(BIN)/python -m pytest -o addopts= -q -n $(JOBS) -p no:warnings -p no:cacheprovider
# TRL's SFT tests, twice. Those that fail with TRL's own trainer, for want of the Hub mostly, are not run with ours.
TRL_PYTEST = HF_DATASETS_CACHE=$(CURDIR)/$(VENV)/hub/arrow OMP_NUM_THREADS=1 TRL_STOCK=stock.xml $(OTHERS_PYTEST)
OF_LORA = -k "-LoraConfig- or [LoraConfig- or (lora and not Config)"

test-eval: $(VENV)/.installed ## the tests of RULER, by lm-eval, which they install
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[eval]'
	$(BIN)/python -m pytest tests/evaluation/test_ruler.py $(ARGS)

test-third-party: $(VENV)/.installed ## PEFT's, transformers' and TRL's own suites, with our adapter, attention and trainer in the place of theirs
	$(BIN)/python -m pip install -qq --disable-pip-version-check parameterized pytest-datadir
	$(call sdist,peft)
	$(call sdist,transformers)
	$(BIN)/python tests/third_party/hub_cache.py $(VENV)/hub
	cp tests/third_party/transformers_common.py $(VENV)/transformers/tests/test_s2attn_common.py
	cd $(VENV)/peft && $(OTHERS_PYTEST) -p longlora_for_lora tests/test_custom_models.py tests/test_decoder_models.py $(OF_LORA) $(ARGS)
	cd $(VENV)/peft && LONGLORA_TARGET_LENGTH=2048 $(OTHERS_PYTEST) -p longlora_for_lora tests/test_decoder_models.py $(OF_LORA) $(ARGS)
	cd $(VENV)/peft && LONGLORA_LORA_ALONE=1 $(OTHERS_PYTEST) -p longlora_for_lora tests/test_decoder_models.py $(OF_LORA) $(ARGS)
	cd $(VENV)/transformers && $(OTHERS_PYTEST) tests/test_s2attn_common.py $(ARGS)
	@version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("trl"))'); \
	if tests/third_party/trl_tests.sh $(VENV)/trl $$version '$(TRL_SOURCE)'; then set -ex; \
		$(BIN)/python tests/third_party/trl_hub.py $(VENV)/trl $(VENV)/hub; cd $(VENV)/trl; \
		$(TRL_PYTEST) -p trl_offline --junitxml stock.xml --tb no tests/test_sft_trainer.py $(ARGS) || [ $$? -eq 1 ]; \
		$(TRL_PYTEST) -p longlora_for_sft tests/test_sft_trainer.py $(ARGS); \
	elif [ -n '$(TRL_SOURCE)' ]; then echo 'TRL_SOURCE=$(TRL_SOURCE) is no checkout of TRL.' >&2; exit 1; \
	else echo "TRL's SFT tests were NOT run: its sdist has none, and GitHub (huggingface/trl, v$$version) can't be reached." \
		"TRL_SOURCE=DIR takes a checkout." >&2; fi

# What is built is installed where there is no checkout: first alone, then with what the tests need. Those of the sdist are run
# without its package, so that what they import is what was installed.
wheel-test: ## the wheel and the sdist in an environment of their own: README, commands, examples (ARGS=tests: the suite)
	rm -rf $(VENV_WHEEL)
	$(PYTHON) -m venv $(VENV_WHEEL)
	.ci/install-torch $(VENV_WHEEL)/bin/python
	$(VENV_WHEEL)/bin/python -m pip install -qq --disable-pip-version-check build
	$(VENV_WHEEL)/bin/python -m build --outdir $(VENV_WHEEL)/dist
	$(VENV_WHEEL)/bin/python -m pip install -qq --disable-pip-version-check $(VENV_WHEEL)/dist/*.whl
	mkdir $(VENV_WHEEL)/alone $(VENV_WHEEL)/sdist
	cd $(VENV_WHEEL)/alone && env -u PYTHONPATH ../bin/python -I $(CURDIR)/tests/installed.py ../bin/hf-longlora
	$(VENV_WHEEL)/bin/python -m pip install -qq --disable-pip-version-check "$$(echo $(VENV_WHEEL)/dist/*.whl)[dev]"
	tar -xzf $(VENV_WHEEL)/dist/*.tar.gz -C $(VENV_WHEEL)/sdist --strip-components 1
	rm -r $(VENV_WHEEL)/sdist/hf_longlora $(VENV_WHEEL)/sdist/hf_longlora_command.py
	cd $(VENV_WHEEL)/sdist && env -u PYTHONPATH ../bin/python -m pytest -n $(JOBS) $(or $(ARGS),$(SHOWN))

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

docs: $(VENV)/.installed ## build the guides and the reference into site/
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.installed ## ruff check, ruff format --check, mypy
	@status=0; for check in 'ruff check .' 'ruff format --check .' mypy; do \
		echo "$$check"; $(BIN)/$$check || status=1; done; exit $$status

format: $(VENV)/.installed ## rewrite the code as lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environments, caches and build outputs
	rm -rf $(VENV) $(VENV_LOWEST) $(VENV_WHEEL) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
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
