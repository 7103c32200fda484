"""What an export format is, and what it is given. A format is one file with one `register`. Own.

A format writes from the model's own codes and scales, one tensor at a time, into a folder that has no name yet; then its
files are read by programs that know nothing of this library, and compared. Nothing is stored otherwise than asked for
without the report saying so. Leaves out: opening checkpoints, the card, and giving the folder its name (`publish/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..config import BitNetQuantizationConfig
from ..modules import NativeLayer, PackedBitLinear, PackedEmbedding, QuantizedEmbedding, QuantizedLayer, shape_of
from ..pages import release_mapped
from ..quantizers import Quantized
from ..registry import Registry
from ..surgery import config_of, processor_of, quantized_layers, quantized_tables
from .report import Check, WrittenTensor

EXPORT_FORMATS: Registry[type[ExportFormat]] = Registry("export format")

# called with the number of float weights that a written tensor stands for
Progress = Callable[[int], object]


# weights that are unpacked at once: some MB, whatever they become
_BLOCK = 1 << 21


@dataclass(frozen=True)
class Source:
    """A quantized model, in train form or packed, and what goes with it.

    Attributes:
        model: its tensors may be mapped from a file; nothing is changed in it.
        tokenizer: None where there is none. name: for the files' metadata.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str

    def __post_init__(self) -> None:
        if self.tokenizer is not None and not hasattr(self.tokenizer, "save_pretrained"):
            raise TypeError(
                f"tokenizer={self.tokenizer!r} is a {type(self.tokenizer).__name__}; pass a tokenizer itself, for example "
                "tokenizer=AutoTokenizer.from_pretrained('gpt2'), or None"
            )

    @property
    def config(self) -> BitNetQuantizationConfig:
        return config_of(self.model)

    @cached_property
    def layers(self) -> dict[str, QuantizedLayer]:
        """Dotted name -> quantized layer."""
        return dict(quantized_layers(self.model))

    @cached_property
    def tables(self) -> dict[str, QuantizedEmbedding]:
        """Dotted name -> quantized table of embeddings."""
        return dict(quantized_tables(self.model))

    @property
    def normed(self) -> list[str]:
        """Names of the layers with a norm in front, unless it is still the identity."""
        return [name for name, layer in self.layers.items() if (norm := layer.sub_norm) and float(norm.blend) != 0.0]

    @cached_property
    def others(self) -> dict[str, Tensor]:
        """Every saved tensor that belongs to no quantized layer or table, under its name in the model; tied ones once."""
        ours = tuple(f"{name}." for name in (*self.layers, *self.tables))
        ignored = set(self.model._keys_to_ignore_on_save or ())
        state = {k: v for k, v in self.model.state_dict().items() if not k.startswith(ours) and k not in ignored}
        return remove_tied_weights_from_state_dict(state, self.model)

    @cached_property
    def weights(self) -> int:
        """Numbers that the quantized tensors stand for, and all others: what a progress bar counts."""
        matrices = (*self.layers.values(), *self.tables.values())
        return sum(math.prod(shape_of(each)) for each in matrices) + sum(tensor.numel() for tensor in self.others.values())

    @staticmethod
    def blocks(layer: QuantizedLayer | QuantizedEmbedding, weights: int = _BLOCK) -> Iterator[Quantized]:
        """The rows of a layer or table, in order, about so many `weights` at a time where it is packed.

        A whole matrix as integers, floats and bytes of the target at once would be many times its packed bytes.
        """
        if not isinstance(layer, PackedBitLinear | PackedEmbedding) or isinstance(layer, NativeLayer):
            yield layer.quantized_weight()  # one scale of many rows takes all of them
            return
        packed, scale = layer.weight.detach(), layer.get_parameter("weight_scale").detach()
        rows = max(1, weights // max(1, shape_of(layer)[1]))
        for start in range(0, len(packed), rows):
            part = slice(start, start + rows)
            yield layer.source.codes(packed[part], scale if len(scale) == 1 else scale[part])
            release_mapped(packed[part])

    @property
    def _vocabulary(self) -> int | None:
        """Token ids that the model takes; None where it does not say."""
        try:
            return getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        except RuntimeError:  # a model without such a table
            return None

    def _within_positions(self, length: int) -> int:
        """`length`, or the number of positions that the model has where that is less."""
        config = self.model.config.get_text_config(decoder=True)
        said = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
        return min([length, *(each for each in said if isinstance(each, int) and each > 0)])

    def probe(self, length: int = 24) -> Tensor:
        """Token ids int64 (1, length) that the model and its readers are compared on; the same each time, or fewer."""
        vocabulary = self._vocabulary
        assert vocabulary is not None, "asked for by `inputs`"
        shape = 1, self._within_positions(length)
        return torch.randint(
            min(3, vocabulary - 1), vocabulary, shape, generator=torch.Generator().manual_seed(0), device="cpu"
        )

    def inputs(self) -> dict[str, Tensor] | None:
        """What the model's forward is called with to compare logits, always the same; None where that is not known."""
        config, main = self.model.config, self.model.main_input_name
        generator = torch.Generator().manual_seed(0)
        if main == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
            shape = (1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        elif main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
            shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        elif main == "input_ids" and self._vocabulary is not None:
            shape = None
        else:
            return None
        inputs = {main: self.probe() if shape is None else torch.randn(shape, generator=generator, device="cpu")}
        if config.is_encoder_decoder:
            vocabulary = getattr(config.get_text_config(decoder=True), "vocab_size", None)
            if vocabulary is None:
                return None
            shape = 1, self._within_positions(8)
            inputs["decoder_input_ids"] = torch.randint(
                min(3, vocabulary - 1), vocabulary, shape, generator=generator, device="cpu"
            )
        return inputs


class ExportFormat:
    """One format. A subclass is a frozen dataclass whose fields are the options that a user may give.

    Attributes:
        summary: one line for people. readers: who loads the files. library: whose files they are, in the Hub's words; None
            where the Hub tells by the files.
    """

    summary: ClassVar[str]
    readers: ClassVar[str]
    library: ClassVar[str | None] = "transformers"

    def refusals(self, source: Source) -> list[str]:
        """Why the format cannot hold this model, each with the way out; empty where it can. Looks at no weight's value."""
        raise AssertionError("abstract")

    def write(self, source: Source, folder: Path, progress: Progress) -> list[WrittenTensor]:
        """Writes everything but the card into `folder`, and says what. Memory: of about one tensor."""
        raise AssertionError("abstract")

    def compare(self, source: Source, folder: Path, written: list[WrittenTensor], logits: bool) -> list[Check]:
        """Reads `folder` back with programs of others. `logits`: also run the model."""
        raise AssertionError("abstract")

    def notes(self, source: Source) -> list[str]:
        """What the target computes differently from this library."""
        return []

    def use(self, source: Source, folder: Path) -> str:
        """Markdown of a card: how what was written into `folder` is loaded."""
        kind, (reader, name) = type(source.model).__name__, processor_of(source.model)
        return (
            f"```python\nfrom transformers import {reader}, {kind}\n\n"
            'path = "..."  # of this repository or folder\n'
            f"{name} = {reader}.from_pretrained(path)\nmodel = {kind}.from_pretrained(path)\n```\n\n"
            f"Read by {self.readers}."
        )
