"""Floor 6: what leaves the house. An export with its parity gate and its card; the way to the Hub."""

from .exporting import export_model
from .importing import import_model, import_tokenizer
from .opening import open_model
from .pushing import PushedRepo, PushReport, push_to_hub

__all__ = ["PushReport", "PushedRepo", "export_model", "import_model", "import_tokenizer", "open_model", "push_to_hub"]
