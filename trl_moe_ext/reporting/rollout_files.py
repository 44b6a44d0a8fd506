"""Names of what a GRPO run leaves in its output directory beside the record, for who writes and who reads it."""

from __future__ import annotations

__all__ = ["COMPLETIONS_DIR", "COMPLETIONS_FILES", "TIMELINE_FILE", "TIMELINE_PICTURE"]

TIMELINE_FILE = "async_timeline.jsonl"
TIMELINE_PICTURE = "async_timeline.png"

# As TRL's GRPOTrainer names them.
COMPLETIONS_DIR = "completions"
COMPLETIONS_FILES = "completions_*.parquet"
