"""From the files of a run to the page."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from trl_moe_ext._version import __version__
from trl_moe_ext.reporting.page.key_figures import head
from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.sections import adapted, cost, drift, loss, rewards, rollout, router, settings

__all__ = ["render_page"]

_TEMPLATES = Path(__file__).parent / "template"
_SECTIONS = (
    *(rewards.section, rollout.section),  # of GRPO: not there in another run
    *(loss.section, router.section, drift.section, adapted.section, cost.section, settings.section),
)


def render_page(run: RunFiles) -> str:
    """The report as one HTML page, without references to anything outside it.

    Whatever comes from the run is escaped: names of models, options and layers are text, never markup.
    """
    # Only our own style sheet and script are taken as they are.
    own = {name: Markup((_TEMPLATES / name).read_text(encoding="utf-8")) for name in ("style.css", "script.js")}
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    return environment.get_template("page.html").render(
        head=head(run),
        sections=[made for section in _SECTIONS if (made := section(run)) is not None],
        style=own["style.css"],
        script=own["script.js"],
        version=__version__,
    )


def _code(text: str) -> Markup:
    """Escaped text, in which words between backticks are set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
