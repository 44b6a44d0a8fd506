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
	trl-moe bench layer --tokens 128,512,2048
