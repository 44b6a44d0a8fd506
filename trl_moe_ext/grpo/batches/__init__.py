"""From the samples in the queue to a packed micro-batch, with the routes of the generator, and its attention."""
