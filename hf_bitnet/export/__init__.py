"""Floor 5: files that other programs read."""

from .native import export_native

__all__ = ["export_native"]
