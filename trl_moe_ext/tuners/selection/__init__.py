"""Which experts of each layer an adapter is for: options, and what they mean for one model."""
