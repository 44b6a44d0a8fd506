"""The report of a run: one HTML page that needs nothing but itself."""

from trl_moe_ext.reporting.page.render import render_page
from trl_moe_ext.reporting.page.run_files import RunFiles, read_run

__all__ = ["RunFiles", "read_run", "render_page"]
