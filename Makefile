# Two commands: `make demo` and `make test`. Everything lives in .venv; nothing is installed elsewhere.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
# Where pip finds no CPU build of torch by itself, it is taken from PyTorch's own wheel index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED := 0
# Byte code is kept: without it every process compiles what it imports, and imports take seconds as it is.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check commands ranks actors parts test-demo test-extended test-service test-jobs test-hosts chaos soak hh bench docs site image sbom lint types quick unit install install-test clean help

help:
	@echo "make demo    install, train a model to follow instructions, show a report (4 to 12 minutes)"
	@echo "make test    lint, types, import floors, unit and end-to-end tests (17 to 25 minutes)"
	@echo "make check   its part under 2 minutes: lint, types, floors, the quickest unit tests"
	@echo "make test-demo   the demo learns, and with learning rate 0 does not (8 to 15 minutes)"
	@echo "make test-extended   what takes long: models of other makers, more ways to die, the image's packages (15 to 30 minutes)"
	@echo "make test-service   the endpoint and its page: engines, Ray Serve, real clients, a browser if there is Chromium"
	@echo "make test-jobs   amenable submit, stop, resume and doctor against a Ray head with its dashboard and tokens"
	@echo "make test-hosts   a run over hosts that are network namespaces, Ray and job as KubeRay starts them; needs root"
	@echo "make chaos   every role killed or stopped in every phase of PPO; writes the table of docs/reliability.md"
	@echo "make soak    half an hour of PPO with a kill every half minute (MINUTES=…; SOAK=--calm strikes nobody)"
	@echo "make hh      the run on real human comparisons (HH_PATH=…)"
	@echo "make bench   the PPO benchmark of bench/README.md"
	@echo "make docs    the generated parts of docs/, and the lines that its links to code lead to"
	@echo "make site    docs/ as a site, in build/site"
	@echo "make image   the container image (BASE=…@sha256:…, TARGET=cpu or cuda); needs Docker"
	@echo "make sbom    a bill of materials (CycloneDX) of what is installed, in dist/sbom.json"

demo: $(VENV)/.installed
	@echo "Now the demo: 3 to 6 minutes on two idle cores."
	@$(BIN)/amenable run recipes/demo.yaml

# Two at a time, the longest first: what starts whole commands, beside it the rest one after another.
test: lint
	@$(MAKE) --no-print-directory -j2 commands types site unit ranks actors parts

check: lint
	@$(MAKE) --no-print-directory -j2 types quick

quick: $(VENV)/.installed-test
	$(BIN)/pytest -q -m "not slow and not thorough"

unit: $(VENV)/.installed-test
	$(BIN)/pytest -q -m "not slow"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/lint-imports --no-logo

types: $(VENV)/.installed-test
	$(BIN)/basedpyright --level error

# The others have targets of their own.
SLOW := slow and not long and not service and not jobs and not hosts and not extended

# Whole commands.
commands: $(VENV)/.installed-test
	$(BIN)/pytest -q -m "$(SLOW)" tests/end_to_end tests/chaos

# Groups of learners.
ranks: $(VENV)/.installed-test
	$(BIN)/pytest -q -m "$(SLOW)" tests/learners

# Actors, with the engines in them.
actors: $(VENV)/.installed-test
	$(BIN)/pytest -q -m "$(SLOW)" tests/actors

# All others.
parts: $(VENV)/.installed-test
	$(BIN)/pytest -q -m "$(SLOW)" --ignore=tests/end_to_end --ignore=tests/chaos --ignore=tests/learners --ignore=tests/actors

test-extended: $(VENV)/.installed-test
	$(BIN)/pytest -q -m extended

test-service: $(VENV)/.installed-lm-eval
	$(BIN)/pytest -q -m service tests/serving

test-jobs: $(VENV)/.installed-test
	$(BIN)/pytest -q -m jobs tests/end_to_end

test-hosts: $(VENV)/.installed-test
	$(BIN)/pytest -q -m hosts tests/cluster

test-demo: $(VENV)/.installed-test
	$(BIN)/pytest -q -m long

chaos: $(VENV)/.installed-test
	$(BIN)/pytest -q -m chaos tests/chaos

MINUTES ?= 30
SOAK ?=
soak: $(VENV)/.installed-test
	$(BIN)/python tests/chaos/soak.py --minutes $(MINUTES) $(SOAK)

HH_PATH ?= ../shared/data/hh-rlhf
hh: $(VENV)/.installed
	$(BIN)/amenable run recipes/hh.yaml corpus.path=$(HH_PATH)

bench: $(VENV)/.installed
	$(BIN)/python -m bench.ppo

docs: $(VENV)/.installed-test
	$(BIN)/python docs/make.py

# Every warning ends the build: a dead link or anchor, a page outside the navigation. Not with --quiet, under which mkdocs
# does not count its warnings. It needs nothing of the program.
site: $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict

TARGET ?= cpu
BASE ?=
image:
	@[ -n "$(BASE)" ] || { echo "Name a Debian image with Python 3.11 by its digest: BASE=python:3.11-slim-bookworm@sha256:…"; exit 2; }
	docker build -f cluster/docker/Dockerfile --target $(TARGET) --build-arg BASE=$(BASE) -t amenable:0.1.0-$(TARGET) .

# In an environment of its own: its packages would not agree with the lock's.
CYCLONEDX ?= 7.5.0
sbom: $(VENV)/.installed
	@$(BIN)/python -m venv $(VENV)/sbom
	@$(VENV)/sbom/bin/python -m pip install -qq cyclonedx-bom==$(CYCLONEDX)
	@mkdir -p dist
	@$(VENV)/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o dist/sbom.json $(BIN)/python
	@echo "dist/sbom.json: $$(grep -c '"bom-ref"' dist/sbom.json) components."

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/.installed: requirements/cpu.lock requirements/install pyproject.toml
	@PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) bash requirements/install run
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements/test.lock
	@PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) bash requirements/install test
	@touch $@

$(VENV)/.installed-lm-eval: $(VENV)/.installed-test requirements/lm-eval.lock
	@PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) bash requirements/install lm-eval
	@touch $@

# In an environment of its own, which is made without that of the program.
$(VENV)/docs/.installed: requirements/docs.lock requirements/install
	@PYTHON=$(PYTHON) VENV=$(VENV)/docs bash requirements/install docs
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
