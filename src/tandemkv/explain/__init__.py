"""`tandemkv explain`: the plan of a step, what it takes as predicted and as measured, and why it is that plan."""

from tandemkv.explain.command import Settings, explain
from tandemkv.explain.report import Explanation, print_explanation

__all__ = ["Explanation", "Settings", "explain", "print_explanation"]
