"""Placeholder of the cupy adapter: core functions take cupy arrays, hooks are not there yet."""
