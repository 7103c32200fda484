"""Floor 6: what leaves the house. An export with its parity gate and its card; the way to the Hub."""

from .exporting import export_model
from .opening import open_model

__all__ = ["export_model", "open_model"]
