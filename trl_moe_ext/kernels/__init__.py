"""Pure functions on tensors: the MLP of routed experts with low-rank updates. Nothing here knows of a host library.

Shape letters in every file of this package:

    T tokens   K top_k   S = T*K routed rows   E experts   H hidden   I intermediate   r rank
"""
