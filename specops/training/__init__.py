"""What every adapter's hook shares: plans, what is kept of a weight, history and report."""

from specops.training.plan import Plan

__all__ = ["Plan"]
