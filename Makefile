# make        lint, types, tests
# make fast   the inner loop: seconds
.PHONY: all lint types test fast golden demo bench

all: lint types test

lint:
	ruff check .

types:
	mypy

test:
	pytest

fast:
	pytest -m fast

golden:
	python -m adapterpack.testing > tests/golden/matrix.md

demo:
	adapterpack demo
	adapterpack demo --causal-lm

bench:
	python benchmarks/merge.py
	python benchmarks/compose.py
