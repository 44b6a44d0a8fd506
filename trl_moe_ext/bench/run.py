"""All measurements of a request, one process each, in interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable

from trl_moe_ext.bench.figures import figure
from trl_moe_ext.bench.fit import Sizes, unfit
from trl_moe_ext.bench.measure import Measured
from trl_moe_ext.bench.plan import ACCURACY_TOKENS, Plan, Request
from trl_moe_ext.bench.process import Missing, errors_in_process, measure_in_process
from trl_moe_ext.bench.results import Results, Row

Measure = Callable[[Plan], Measured | Missing]
Errors = Callable[[Plan], dict[str, float] | Missing]
Say = Callable[[str], object]


def run(
    request: Request,
    sizes: Sizes,
    say: Say,
    measure: Measure = measure_in_process,
    errors: Errors = errors_in_process,
) -> Results:
    """Measure every peer with every number of tokens in each round, then the errors of its gradients.

    Args:
        request: what to measure.
        sizes: of the model, from `sizes_of`.
        say: told about each measurement, before it starts and when it is done, in parts of a line.
        measure, errors: how one plan is carried out.

    Raises:
        ConfigError: it does not fit in memory.
    """
    left_out = unfit(request, sizes)
    rows = [
        Row(tokens, peer, missing=Missing(left_out[tokens, peer]) if (tokens, peer) in left_out else None)
        for tokens in request.tokens
        for peer in request.peers
    ]
    for number in range(1, request.rounds + 1):
        for row in rows:
            if row.missing is not None:
                continue
            say(f"round {number} of {request.rounds}, {row.tokens} tokens, {row.peer}: ")
            found = measure(request.plan(row.peer, row.tokens))
            if isinstance(found, Missing):
                row.missing, row.rounds = found, []
            else:
                row.rounds.append(found)
            say(f"{_in_short(found)}\n")
    results = Results(request, sizes, rows)
    measured = {row.peer for row in rows if row.rounds}
    for peer in request.peers if request.kind == "experts" else ():
        if peer in measured:
            say(f"errors of gradients, {ACCURACY_TOKENS} tokens, {peer}: ")
            results.errors[peer] = answer = errors(request.plan(peer, ACCURACY_TOKENS))
            say(f"{answer.reason if isinstance(answer, Missing) else 'done'}\n")
    return results


def _in_short(found: Measured | Missing) -> str:
    if isinstance(found, Missing):
        return found.reason
    memory = "" if found.extra_bytes is None else f", {figure(found.extra_bytes / 1e6)} MB"
    return f"{figure(1e3 * found.median)} ms{memory}"
