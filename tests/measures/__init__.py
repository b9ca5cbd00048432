"""Measures against closed forms and definitions."""
