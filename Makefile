# `make help` lists the commands. All of them run in .venv, made on first use from the hashed lock.

PYTHON ?= python3
UV ?= uv
ARGS ?=
SEED ?=
MINUTES ?=

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo dev bench test chaos mutants lint types ci lock clean

help: ## List these commands.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# Each of the next commands is one plain command, so make starts it without a shell in between: Ctrl-C and
# SIGTERM reach it directly, and make waits until it has put everything away.

demo: $(STAMP) ## Run a whole sale on embedded servers, then audit it; ARGS="--keep" leaves it up.
	@$(BIN)/fairlane demo $(ARGS)

dev: $(STAMP) ## Run every process on embedded servers and the sandbox provider until Ctrl-C.
	@$(BIN)/fairlane dev $(ARGS)

# Two at a time, by file: they mostly wait for processes. The longest come first, as the folders are named.
test: $(STAMP) ## Run the tests; ARGS="-k word" chooses some.
	@$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(STAMP) ## Measure beside a lock, a plain queue and plain SQL; ARGS="--quick" for less than a minute.
	@$(BIN)/fairlane bench --picture fairlane-bench.svg $(ARGS)

chaos: $(STAMP) ## Run a sale while everything fails, for MINUTES=10; SEED=7 replays the faults of a run.
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

mutants: $(STAMP) ## Take each line that keeps a promise away and expect its test to fail; ARGS="word" chooses some.
	@$(BIN)/python -m tests.mutants $(ARGS)

lint: $(STAMP) ## Check style, formatting and which package may import which.
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/lint-imports

types: $(STAMP) ## Check the types (mypy, strict).
	@$(BIN)/mypy

ci: ## Run what the build server runs: tests, lint, types.
	@.ci/run

lock: ## Resolve the dependencies anew (needs uv) and write uv.lock and the hashed lock files for pip.
	$(UV) lock
	@$(call export,requirements.lock,--all-extras --all-groups,"For a clone: the service$(,) the embedded servers$(,) tests and tools.")
	@$(call export,requirements-runtime.lock,--no-default-groups,"For the container image: what the service runs on.")
	@$(call export,requirements-build.lock,--only-group build,"What builds the wheel for the container image.")

clean: ## Remove .venv, caches and build output; data under .fairlane stays.
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
	@find producers workers shared ops tests -name __pycache__ -type d -prune -exec rm -rf {} +

, := ,
# $(1) file, $(2) what of uv.lock goes in, $(3) its first comment. Written aside first: no half lock file.
define export
{ printf '# %s\n# Written by `make lock` from uv.lock; do not edit.\n' $(3) && \
  $(UV) export --frozen --quiet --format requirements.txt --no-header --no-annotate --no-emit-project $(2); } \
  > $(1).new && mv $(1).new $(1) && echo "wrote $(1)" || { rm -f $(1).new; exit 1; }
endef

# Everything has a hash and comes as a wheel; the project itself is linked in with the locked build backend,
# so nothing without a hash is downloaded. pip's own settings (PIP_INDEX_URL, pip.conf) keep working.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Fairlane needs Python 3.11 or newer, and '$(PYTHON)' is not. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv >/dev/null || { rm -rf .venv; \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null || { \
	  echo "No pip for .venv. On Debian and Ubuntu: apt install python3-venv; then: make clean" >&2; exit 1; }
	@echo "Installing into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --only-binary :all: \
	  --require-hashes --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
	  --no-build-isolation --no-deps --editable .
	@touch $@
