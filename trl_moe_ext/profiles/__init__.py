"""How much each expert of a model is used on a data set: measured, kept in a file, and made into a choice."""
