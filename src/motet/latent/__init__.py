"""Taste as a latent variable: posterior, prior, prototypes. Pure functions of named tensors."""
