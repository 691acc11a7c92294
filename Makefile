# `make demo`, `make fast` and `make test` need python3 and make, nothing else: everything goes into .venv.
# A GPU machine names its extra: `make demo EXTRA=cuda12`.

PYTHON ?= python3
EXTRA ?=
VENV ?= .venv

comma := ,
# The stamp carries the extras, so that another EXTRA installs what is missing.
stamp = $(VENV)/installed-$(subst $(comma),-,$(1))

.PHONY: demo fast test lint clean

demo: $(call stamp,models$(EXTRA:%=,%))
	$(VENV)/bin/python examples/demo.py

# What takes seconds: most of what a change can break.
fast: $(call stamp,test$(EXTRA:%=,%))
	$(VENV)/bin/python -m pytest -n 2 -m "not slow and not gpu"

test: $(call stamp,test$(EXTRA:%=,%))
	$(VENV)/bin/python -m pytest -n 2

lint: $(call stamp,dev$(EXTRA:%=,%))
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV)

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --editable '.[$(subst -,$(comma),$*)]'
	touch $@
