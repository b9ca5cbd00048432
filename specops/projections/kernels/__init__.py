"""Projections of the kernels of convolutions."""
