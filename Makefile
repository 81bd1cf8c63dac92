# The two commands: `make run` executes every notebook, `make test` runs the test suite. Both create .venv when it is missing.
#   make run TIER=smoke              another tier: smoke, default, full (where there is one) or paper
#   make run NB=10_vit_pruning       some notebooks, separated by commas
SHELL := /bin/bash
PYTHON ?= python3
TIER ?= default
NB ?=
JOBS ?= 2

BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
comma := ,

# `-P` for every Python: the repository root stays off sys.path, where the folder kernels/ would pass for the package `kernels`.
export PYTHONSAFEPATH := 1
export PYTHONUNBUFFERED := 1

.PHONY: run test lab bench parity train expected lint strip lock clean
.DEFAULT_GOAL := run

run: $(READY)
	@status=0; \
	$(BIN)/snakemake -c $(JOBS) --keep-going --rerun-incomplete --nolock --rerun-triggers mtime params input code \
	    --quiet rules reason host --config tier=$(TIER) notebooks="$(NB)" || status=$$?; \
	$(BIN)/python -m keeprate.ledger --tier $(TIER) --notebooks $(subst $(comma), ,$(NB)) || status=$$?; \
	exit $$status

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) $(ARGS)

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=notebooks

# Time every kernel against what it replaces, on a GPU where there is one; let nothing else run meanwhile (minutes).
#   make bench ARGS='--ops token_stats --note "a training run on one core"'
bench: $(READY)
	$(BIN)/python -m keeprate_kernels.bench $(ARGS)

# Do our KV-cache methods keep the positions that kvpress keeps? It needs an older transformers, hence an environment of its own
# with the newest kvpress there is; data/parity/kvpress.csv holds the answer. Downloads, minutes the first time.
parity: $(READY) .venv-parity/.ready
	$(BIN)/python parity/ours.py prepare runs/parity
	.venv-parity/bin/python -I parity/theirs.py runs/parity
	$(BIN)/python parity/ours.py compare runs/parity

# Rebuild the embedded models. Hours, not minutes; the repository carries the result.
train: $(READY)
	$(BIN)/python -m keeprate.train.vit_digits
	$(BIN)/python -m keeprate.train.siglip_digits
	$(BIN)/python -m keeprate.train.llama_docs
	$(BIN)/python -m keeprate.train.llama_docs_draft
	$(BIN)/python -m keeprate.train.clip_digits
	$(BIN)/python -m keeprate.train.llava_digits

# Store the numbers of the latest runs in data/expected, showing old and new.
expected: $(READY)
	$(BIN)/python -m keeprate.execute --update-expected $(subst $(comma), ,$(NB)) --tier $(TIER)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --keep-id --verify $(wildcard notebooks/*.ipynb)

# Format everything, and strip outputs from the notebooks, keeping their cell ids.
strip: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout --keep-id $(wildcard notebooks/*.ipynb)

# torch comes first, alone: asked for by this exact version it can be a CPU wheel; as somebody's dependency it is gigabytes.
define TRY
@for attempt in 1 2 3; do $(PIP) install $(1) && break; [ $$attempt -lt 3 ] || exit 1; echo "trying again"; sleep 5; done
endef
# An installation that was cut short begins anew, for pip takes a half-copied package for an installed one.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "keeprate needs Python 3.11 or newer, not " + sys.version)'
	@echo "installing into .venv, once; this takes some minutes"
	@$(PYTHON) -m venv $$([ -e .venv/.installing ] && echo --clear) .venv && touch .venv/.installing
	$(call TRY,$$(grep '^torch==' requirements.lock))
	$(call TRY,-r requirements.lock)
	$(call TRY,--no-deps --no-build-isolation --editable .)
	@touch .venv/.installing && mv .venv/.installing $(READY)

.venv-parity/.ready: PIP := $(CURDIR)/.venv-parity/bin/python -m pip --quiet --disable-pip-version-check --no-input
.venv-parity/.ready:
	@$(PYTHON) -m venv --clear .venv-parity
	$(call TRY,$$(grep '^torch==' requirements.lock))
	$(call TRY,--constraint <(grep '^torch==' requirements.lock) kvpress)
	@touch $@

# Solve pyproject.toml anew in a fresh environment; writes requirements.lock and environment.yml.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install $$(grep '^torch==' requirements.lock)
	.venv-lock/bin/python -m pip install -e '.[dev]'
	# triton: the version that torch's CUDA wheel asks for, so that either wheel installs; there is none for macOS
	.venv-lock/bin/python -m pip freeze --exclude-editable \
	    | sed -e 's/^\(torch==[^+]*\)+.*/\1/' -e 's/^triton==.*/triton==3.7.1; sys_platform == "linux"/' > requirements.lock
	{ grep -v '^      - [^-]' environment.yml; sed 's/^/      - /' requirements.lock; } > .venv-lock/environment.yml
	mv .venv-lock/environment.yml environment.yml
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock .venv-parity runs .snakemake .pytest_cache .ruff_cache .hypothesis lib/*.egg-info
	find lib kernels tests -name __pycache__ -prune -exec rm -rf {} +
