"""``python -m trl_moe_ext.experts.census``: every MoE type of the installed transformers against every promise.

For maintainers. Run it against a new version of transformers to see what of it works before anything is released here.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence

import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from trl_moe_ext.experts.census.checks import CHECKS
from trl_moe_ext.experts.census.discover import discover
from trl_moe_ext.experts.census.esft_checks import ESFT_CHECKS
from trl_moe_ext.experts.census.report import TypeReport, report_type

TUNERS = {"moe_lora": CHECKS, "moe_esft": ESFT_CHECKS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print the table and what failed; 1 if anything did."""
    parser = _parser()
    options = parser.parse_args(arguments)
    known = TUNERS[options.tuner]
    checks = {name: known[name] for name in options.checks or known if name in known}
    if len(checks) < len(options.checks or checks):
        parser.error(f"{options.tuner} has the checks {', '.join(known)}")
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    types, unbuilt = options.types, {}
    if not types:
        found = discover()
        types = [*(() if options.composites else found.own), *found.composite]
        unbuilt = found.failed
    progress = Console(stderr=True)
    reports = [report_type(t, checks) for t in track(types, "checking", console=progress, transient=True)]
    unbuilt |= {report.model_type: report.not_run for report in reports if report.not_run is not None}
    reports = [report for report in reports if report.not_run is None]
    if options.json:
        types = [report.as_dict() for report in reports]
        print(json.dumps({"transformers": transformers.__version__, "not_run": unbuilt, "types": types}))
    else:
        _print(reports, unbuilt, list(checks))
    return int(any(report.failed for report in reports))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m trl_moe_ext.experts.census", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all that have routed experts if none is given")
    parser.add_argument("--composites", action="store_true", help="only types that nest another one with experts")
    parser.add_argument("--tuner", choices=list(TUNERS), default="moe_lora", help="default: %(default)s")
    parser.add_argument("--checks", nargs="+", metavar="CHECK", help="default: all that the tuner has")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _print(reports: Sequence[TypeReport], unbuilt: dict[str, str], checks: Sequence[str]) -> None:
    table = Table(title=f"Routed experts in transformers {transformers.__version__}")
    for column in ("type", "experts", "read from", *checks):
        table.add_column(column.replace("_", " "))
    for report in reports:
        marks = ("[green]ok[/]" if report.results.get(c, "") is None else "[red]FAIL[/]" for c in checks)
        table.add_row(report.model_type, report.experts, report.read_from, *marks)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for report in reports:
        for check, error in report.failed.items():
            console.print(f"{report.model_type}: {check}: {error}", markup=False, soft_wrap=True)
    for model_type, reason in unbuilt.items():
        console.print(f"not run: {model_type}: {reason}", markup=False, soft_wrap=True)
    passed = sum(not report.failed for report in reports)
    console.print(f"{passed} of {len(reports)} types keep every promise.")


if __name__ == "__main__":
    sys.exit(main())
