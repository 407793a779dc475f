# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.
# Paths are relative throughout, so that a checkout may lie in a folder with a space in its name.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.ready-dev
UNFINISHED := .venv/.unfinished
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types build clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

demo: $(READY) ## index the documentation of Python's standard library and ask it something
	@$(BIN)/embell demo $(ARGS)

test: $(DEV) ## run the tests; ARGS="-k search -x" goes to pytest
	@$(BIN)/python -m pytest $(ARGS)

lint: $(DEV) ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(DEV) ## put style and formatting right
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Type checkers cannot follow the editable install: show them the folders under the names they install as.
types: $(DEV) ## check the types
	@rm -rf .types/embell && mkdir -p .types/embell
	@for file in base/* engine indexers cli training; do ln -s "../../$$file" .types/embell/; done
	@MYPYPATH=.types $(BIN)/python -m mypy -p embell $(ARGS)

build: $(DEV) ## make the wheel and the source distribution in dist/
	@rm -rf build dist
	@$(BIN)/python -m build --no-isolation --outdir dist

clean: ## remove what the other targets made, except .venv
	@rm -rf build dist .types .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Two set-ups in one .venv: what running takes (.ready), and what developing takes besides (.ready-dev).
# A stamp is written last, and holds the folder that the set-up was made in: in a moved checkout it is made again.
# A set-up that was killed leaves .unfinished behind and is begun anew. One that failed (no network, say) left
# nothing half-written: the next call goes on from there.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
$(READY): again
endif
ifneq ($(shell cat $(DEV) 2>/dev/null),$(CURDIR))
$(DEV): again
endif

.PHONY: again
again:

$(READY): pyproject.toml constraints.txt
	@$(call set_up,cpu,$(READY))

$(DEV): pyproject.toml constraints.txt
	@$(call set_up,cpu$(comma)dev,$(READY) $(DEV))

comma := ,

# set_up EXTRAS STAMPS
define set_up
"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "embell needs Python 3.10 or newer; name one: make PYTHON=...")'
	@if [ -e $(UNFINISHED) ]; then echo 'The last set-up was interrupted: .venv is made anew.'; rm -rf .venv; fi
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo 'Bringing .venv up to date.'; \
	else \
		echo 'Making .venv. The first time this takes a few minutes, most of them for PyTorch.'; rm -rf .venv; \
	fi
	@mkdir -p .venv && rm -f $(2) && touch $(UNFINISHED)
	@if { [ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv; } \
		&& $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(1)]'; \
	then rm $(UNFINISHED) && for stamp in $(2); do pwd -P >$$stamp; done && echo '.venv is ready.'; \
	else rm -f $(UNFINISHED); echo '.venv is not ready: see above. The next make tries again.' >&2; exit 1; \
	fi
endef
