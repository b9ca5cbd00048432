"""What every adapter's hook shares: plans, weights under rules, firings, history and report."""

from specops.training.plan import Plan

__all__ = ["Plan"]
