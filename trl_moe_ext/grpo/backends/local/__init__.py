"""A generator of its own: a process that generates with transformers, on a CPU or a GPU."""
