"""The loss of a policy: the weights of tokens that another policy drew, what is logged of them, and routing replay."""
