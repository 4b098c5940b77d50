"""Mimicry protection: a loss and a budget, one PGD loop, and what surrounds them."""
