"""How a command line refuses what it was given."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def only_line_of(capsys: pytest.CaptureFixture[str], parse: Callable[[], object]) -> str:
    """The only line on stderr of a parse that ends the process."""
    with pytest.raises(SystemExit) as stopped:
        parse()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err
