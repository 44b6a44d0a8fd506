.PHONY: check test slow bench

check:
	ruff check .
	ruff format --check .
	mypy

test:
	python -m pytest

slow:
	python -m pytest -m "slow or distributed"

bench:
	python -m trl_moe_ext.bench
