"""A vLLM server as the generator: given the adapter by name, version after version."""
