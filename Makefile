# make demo | test | lint | typecheck | clean | help
#
# Every target makes its own virtual environment first; nothing outside this folder is changed (make demo may install
# an OpenGL library with apt-get, on Debian as root).

# a pip requirement: which torch to install, for example TORCH="torch==2.7.1"
TORCH ?= torch
# the Python to build the environment from; empty: the first >= 3.10 that works
PYTHON ?=
# more arguments, for example make demo ARGS="--preset smoke" or make test ARGS="tests/lam -x --no-cov"
ARGS ?=
VENV ?= .venv

BIN := $(VENV)/bin
# installed again when pyproject.toml or TORCH changes, and only then
TORCH_ID := $(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
DEMO := $(VENV)/.demo-$(TORCH_ID)
TEST := $(VENV)/.test-$(TORCH_ID)

# A bare `python3.12` may be a shim that fails, and a Python without ensurepip cannot make an environment: each is run.
# Newer than 3.13 comes last: not everything has wheels for it yet.
define FIND_PYTHON
for wanted in '(3,10)<=v<=(3,13)' '(3,10)<=v'; do \
  for python in $(PYTHON) $(if $(PYTHON),,python3 python3.13 python3.12 python3.11 python3.10 \
      "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.*/bin/python3 /usr/bin/python3 /usr/local/bin/python3); do \
    if "$$python" -c "import sys, venv, ensurepip; v = sys.version_info[:2]; sys.exit(not ($$wanted))" >/dev/null 2>&1; \
    then echo "$$python"; exit 0; fi; \
  done; \
done; exit 1
endef

.PHONY: help demo test lint typecheck clean test-hosts-pins
.SECONDARY:
.DELETE_ON_ERROR:

help:
	@echo 'make demo       LARA from nothing in a simulator, about six minutes on two cores; results in outputs/quickstart/'
	@echo '                ARGS="--preset smoke": under a minute, ARGS="--help": every knob'
	@echo 'make test       all tests, with coverage'
	@echo 'make test-hosts-pins   the core tests under the pins of GR00T N1.6 and of LeRobot, in two more environments'
	@echo 'make lint       ruff; make typecheck: mypy'
	@echo 'make clean      remove the virtual environment and caches (outputs/ stays)'
	@echo 'TORCH="torch==2.7.1" chooses the torch to install, PYTHON=python3.11 the Python'

demo: $(DEMO)
	@$(BIN)/python examples/quickstart.py $(ARGS)

test: $(TEST)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(if $(filter tests/%,$(ARGS)),,tests) \
	  --cov=lara_adapter --cov-report=term --cov-fail-under=90 $(ARGS)

# The same core tests under the pins of the hosts that users install this into; each in an environment of its own.
PINS_gr00t := 3.10 "torch==2.7.1" "transformers==4.51.3" "numpy==1.26.4" "peft==0.17.1" "accelerate==1.15.0"
PINS_lerobot := 3.12 "torch==2.11.*" "transformers==5.5.4" "peft==0.21.*" "accelerate==1.15.0"
PYTHON_OF = $(firstword $(shell for p in python$(1) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(1).*/bin/python3; do \
  "$$p" -c 'import venv, ensurepip' >/dev/null 2>&1 && echo "$$p"; done))

test-hosts-pins: test-pins-gr00t test-pins-lerobot

test-pins-%: $(VENV)-%/.installed
	mkdir -p outputs
	HF_HUB_OFFLINE=1 $(VENV)-$*/bin/python -m pytest tests --ignore=tests/examples --junitxml=outputs/$*-pins.xml $(ARGS)

$(VENV)-%/.installed: pyproject.toml
	@test -n '$(call PYTHON_OF,$(word 1,$(PINS_$*)))' || \
	  { echo 'make test-pins-$*: Python $(word 1,$(PINS_$*)) is needed and was not found' >&2; exit 1; }
	$(call PYTHON_OF,$(word 1,$(PINS_$*))) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check --quiet $(wordlist 2,99,$(PINS_$*)) \
	  safetensors "huggingface-hub" pytest pytest-timeout "setuptools>=70.1"
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(TEST)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage htmlcov
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@python=$$($(FIND_PYTHON)) || { echo 'No usable Python >= 3.10 found (with venv and ensurepip). Install one' \
	  '(Debian: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3 ...' >&2; exit 1; }; \
	echo "Making $(VENV) from $$("$$python" -c 'import sys; print(sys.executable, "%d.%d.%d" % sys.version_info[:3])')"; \
	"$$python" -m venv $(VENV)

$(DEMO): EXTRAS := demo
$(TEST): EXTRAS := lam,train,vq,viz,demo,test
$(DEMO) $(TEST): pyproject.toml | $(BIN)/python
	@echo 'Installing $(TORCH) and the extras [$(EXTRAS)] into $(VENV) (once; torch is large)'
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on '$(TORCH)'
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[$(EXTRAS)]'
	@touch $@
