"""Weights that ship with the package, a model card for each, and the code that trained them."""
