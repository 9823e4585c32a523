# The commands of this project. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_COMPILE := $(BIN)/pip-compile --quiet --strip-extras --no-header --no-emit-find-links \
	--no-emit-index-url --no-emit-trusted-host

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: lock
lock: $(VENV)/dev ## Compile pyproject.toml into the two lock files
	$(PIP_COMPILE) --output-file requirements.lock pyproject.toml
	@# torch's CPU build calls itself 2.13.0+cpu; the lock must also fit the CUDA build.
	sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements.lock
	(echo '-c requirements.lock'; $(BIN)/python -m dependency_groups dev) > dev.in
	$(PIP_COMPILE) --output-file requirements-dev.lock dev.in
	rm dev.in

$(VENV)/dev:
	touch $@
