"""The `trl-moe` command: one file a sub-command, heavy imports inside its function so that `--help` is quick."""
