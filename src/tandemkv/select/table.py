"""Selectors by name."""

from tandemkv.select.base import Selector
from tandemkv.select.window import Window

SELECTORS: dict[str, Selector] = {"window": Window()}
