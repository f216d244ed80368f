# make run    sets everything up and runs the daemon on an embedded Postgres, following a live demonstration feed
# make test   sets everything up and runs every check and every test
# make check  format, lint, types, import contracts, docs tests
# make e2e    only the end-to-end tests          make bench  speed, latency, memory and growth, as ratios (docs/performance.md)
# make torture  kills, cuts and file accidents at length: TORTURE_RUNS=10000 (deaths), TORTURE_SEED=n to see one again
# make fuzz   ten minutes each for lines and callbacks: FUZZ_SECONDS=3600 for longer
# make secrets  makes the passwords and tokens that compose.yml reads
# make container-test  builds the image and bills recorded lines with it, with the flags of compose.yml
# make lock   resolves the dependencies anew (needs uv)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := test
.PHONY: setup run check test e2e bench torture fuzz lock secrets container-test

setup: $(STAMP)

# Only hashed packages are installed, the build backend among them; pip itself stays as venv made it.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'setup: $(PYTHON) is older than Python 3.11: make PYTHON=python3.12 setup' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

run: setup
	exec $(BIN)/python deploy/demo/run.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy billing_tailer tests $(wildcard deploy/demo/*.py)
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_docs.py

test: check
	$(BIN)/python -m pytest

e2e: setup
	$(BIN)/python -m pytest -m e2e

bench: setup
	$(BIN)/python -m tests.bench

torture: setup
	$(BIN)/python -m tests.torture

fuzz: setup
	BILLING_TAILER_TEST_FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) $(BIN)/python -m pytest -s tests/test_fuzz_parser.py tests/test_fuzz_callbacks.py

# What compose.yml reads; a file that is there stays as it is.
secrets:
	sh deploy/secrets.sh

# The image, built and run with the flags of compose.yml; needs root, podman and debootstrap.
container-test: setup
	BILLING_TAILER_TEST_REQUIRE_E2E=1 $(BIN)/python -m pytest tests/e2e/test_container.py

# The image's lock (setuptools builds our wheel in there, and does not stay) has the versions of the other one.
# No set-up first: this is what repairs a lock that cannot be installed.
lock:
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --upgrade --quiet --custom-compile-command 'make lock' \
		--output-file requirements.lock
	echo setuptools | uv pip compile pyproject.toml - --constraint requirements.lock --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-emit-find-links --quiet --custom-compile-command 'make lock' \
		--output-file requirements.runtime.lock
	cd tests/e2e/litellm && uv pip compile requirements.in --universal --python-version 3.11 --no-annotate \
		--no-emit-index-url --no-emit-find-links --upgrade --quiet --custom-compile-command 'make lock' \
		--output-file requirements.txt
	cd tests/vulnerabilities && uv pip compile requirements.in --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-emit-index-url --no-emit-find-links --upgrade --quiet --custom-compile-command 'make lock' \
		--output-file requirements.txt
	@! grep -n -e '://' -e '^--' requirements.lock requirements.runtime.lock tests/e2e/litellm/requirements.txt tests/vulnerabilities/requirements.txt
