"""Where completions come from: what a rollout backend has to do, and the ones that come with the package."""
