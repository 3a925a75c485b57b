# `make` alone: check and test.
.PHONY: all setup run test check fmt bench soak audit test-node clean
# The system's own Python where it will do: distributions optimise theirs by profile, which one built by hand rarely is (12 % of all speed).
PYTHON ?= $(shell /usr/bin/python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo /usr/bin/python3 || echo python3)
STAMP := .venv/.stamp

all: check test

setup: $(STAMP)

run: setup ; @.venv/bin/python -m bench.demo
# Two modules at a time; a test that is untimely runs again alone (tests/timing.py).
test: setup ; .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
check: setup ; .venv/bin/ruff check && .venv/bin/ruff format --check && .venv/bin/mypy
fmt: setup ; .venv/bin/ruff check --fix && .venv/bin/ruff format
# Both in less than 20 minutes; nginx and haproxy only where they are installed.
bench: setup ; .venv/bin/python -m bench.hotpath --open && .venv/bin/python -m bench.peers
soak: setup ; .venv/bin/python -m pytest -m soak --timeout 3600
# What we ship (var/audit: licences, SBOM), then known advisories of all that is locked; needs a network, and fails where the database has no answer.
audit: setup
	.venv/bin/python -m tests.shipped var/audit && cat var/audit/licences.txt
	.venv/bin/pip-audit --strict --requirement requirements.lock --require-hashes --disable-pip --progress-spinner off
test-node: setup ; .venv/bin/python -m pytest -m node
clean: ; rm -rf .venv var/demo var/demo-? tests/node/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
