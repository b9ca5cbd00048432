"""Placeholder of the jax adapter: core functions take jax arrays, hooks are not there yet."""
