"""From the words of a config to the modules of a model, for every tuner of this package."""
