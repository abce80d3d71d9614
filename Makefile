# The same commands as .ci/run, for a virtual environment that is active already:
#   python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e ".[dev]"
.PHONY: check test test-gpu ci

check:
	ruff check .
	ruff format --check .
	mypy

test:
	python -m pytest

test-gpu:
	python -m pytest -m gpu

ci:
	.ci/run
