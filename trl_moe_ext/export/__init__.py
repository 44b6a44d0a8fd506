"""An adapter in the layouts that servers read."""
