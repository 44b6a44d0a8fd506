"""Group relative policy optimisation whose generator may be another engine, or some steps behind."""
