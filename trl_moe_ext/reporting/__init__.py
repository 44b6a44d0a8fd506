"""What a run tells its user: what is trained, how the loss went, where the adapter is."""
