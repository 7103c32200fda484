"""What a model reads, for who writes of it. Own."""

from __future__ import annotations

from torch import nn


def processor_of(model: nn.Module) -> tuple[str, str]:
    """The class of transformers that makes the model's inputs, and what its object is called."""
    main = getattr(model, "main_input_name", "input_ids")
    name = {"input_ids": "AutoTokenizer", "pixel_values": "AutoImageProcessor"}.get(main, "AutoProcessor")
    return name, "tokenizer" if main == "input_ids" else "processor"
