"""What the routers of a model do: which they are, what each decided, and what can be said and asked of it."""
