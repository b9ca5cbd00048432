"""Tests that need several processes: each file of cases runs in one group of them."""
