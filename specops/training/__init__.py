"""What all adapters share: plans, weights under rules, firings of rules, history and report.

A *firing* is one application of a rule to a weight, at a step at which its plan makes it act.
"""

from specops.training.plan import Plan

__all__ = ["Plan"]
