"""Projections of matrices: Dense weights."""
