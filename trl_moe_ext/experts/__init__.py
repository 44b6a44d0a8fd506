"""What a module of routed experts is: how to find one, read its layout, and make one from a dense MLP."""
