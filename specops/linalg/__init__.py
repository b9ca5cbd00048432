"""Iterative linear algebra on top of matrix products."""
