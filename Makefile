PYTHON ?= python
CXX_SOURCES = $(shell find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help install test versions lint format types docs bench wheels ci

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install:  ## install the package in this environment, editable, with all that development needs
	$(PYTHON) -m pip install -c constraints.txt -e '.[dev]'

test:  ## run the tests, without the slow ones
	$(PYTHON) -m pytest -n 2 --dist loadfile

versions:  ## run the tests of diffusers' networks with the oldest diffusers that they support, and the newest
	PYTHON=$(PYTHON) tests/diffusers_versions.sh

lint:  ## check the code's style
	ruff check
	ruff format --check
	clang-format --dry-run --Werror $(CXX_SOURCES)

format:  ## format the code
	ruff check --fix
	ruff format
	clang-format -i $(CXX_SOURCES)

types:  ## check the types
	$(PYTHON) -m mypy

docs:  ## build the documentation into site/
	$(PYTHON) -m mkdocs build --strict

bench:  ## run the kernel benchmark briefly, to see that it works
	$(PYTHON) -m benchmarks.kernels --quick

wheels:  ## build into dist/ what is published: the source distribution, and a wheel for each platform
	.ci/wheels

ci:  ## run everything that a submission must pass
	.ci/run
