"""GGUF files of llama.cpp and bitnet.cpp: the model behind the metadata, its names, its layers. Own.

transformers reads the config from the metadata (of a copy without weights, because its reader stops at types it does not
know); names are of the package `gguf`. What the converters did to tensors is undone: the llama architecture has the rows of
queries and keys in another order (pairs that rotate together lie side by side), gemma's norms have 1 added. BitNet's
architectures, which transformers does not read, are here: rotation in halves, so no rows move; `bitnet` computes with SiLU,
`bitnet-b1.58` and `bitnet-25` with squared ReLU.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from ..gguf_file import ACTIVATION_KEY, I2_S, GGUFFile, Stored, type_name
from ..quantizers import ACTIVATION_SCHEMES
from .assembly import Wanted
from .codes import Found, Levels, Misfit, fit
from .folder import model_class, model_config
from .gguf_gemma import set_attention, set_scale
from .gguf_positions import ROTARY, said, set_positions
from .gguf_types import floats, is_float, layer_weight
from .recognition import recognise


@dataclass(frozen=True)
class _Architecture:
    """named: in the package gguf. permuted: whether rows of queries and keys were. norm_offset: what norms have added.
    activation: of BitNet's feed-forward, None for architectures that transformers reads.
    """

    named: str
    permuted: bool = False
    norm_offset: float = 0.0
    activation: str | None = None


_ARCHITECTURES = {
    "llama": _Architecture("llama", permuted=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "phi3": _Architecture("phi3"),
    "gemma2": _Architecture("gemma2", norm_offset=1.0),
    "gemma3": _Architecture("gemma3", norm_offset=1.0),
    "bitnet": _Architecture("bitnet", activation="silu"),
    "bitnet-b1.58": _Architecture("bitnet", activation="relu2"),
    "bitnet-25": _Architecture("bitnet", activation="relu2"),
}
# of BitNet, which the package gguf knows under the names of an older model
_BITNET_NORMS = {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}
_HEAD = "lm_head"


class GGUFModel:
    """`Contents` of a file.

    Args:
        base: folder or Hub name of a model with the same architecture, whose config.json is taken instead of the metadata.
        activation: scheme of all quantized layers; None takes what the file says.

    Raises ValueError for an architecture that is not known, or one of which the metadata does not say enough.
    """

    def __init__(self, path: Path, outside: str, base: str | None, activation: str | None = None) -> None:
        require_gguf()
        self.file, self.outside, self.source = GGUFFile(path), outside, str(path)
        name = self.file.architecture
        if name not in _ARCHITECTURES:
            raise ValueError(f"{path} is of the architecture {name!r}; legal: {', '.join(_ARCHITECTURES)}")
        parts = self.file.metadata.get("split.count", 1)
        if parts != 1:
            raise ValueError(f"{path} is one of {parts} parts; join them first: llama-gguf-split --merge <first part> <file>")
        self.architecture = _ARCHITECTURES[name]
        self.config = model_config(base) if base is not None else self._config()
        set_scale(self.file, self.config)
        self.activation = activation or self._activation()

    def tensors(self, wanted: Wanted) -> Iterator[tuple[str, Tensor | Found | Misfit]]:
        names = self._names(wanted)
        for name, stored in self.file.tensors.items():
            if name in ROTARY or _scaled(name) in self.file.tensors:
                continue
            ours = names.get(name)
            if ours is None:
                raise ValueError(
                    f"{self.source} holds the tensor {name}, for which {model_class(self.config).__name__} has no place; give "
                    "the config of the right model: import_model(..., base=<folder or Hub name>)"
                )
            wanted.check(ours, stored.shape)
            got = self._layer(stored) if ours.removesuffix(".weight") in wanted.places else self._other(stored)
            yield ours, got._replace(activation=self.activation) if isinstance(got, Found) else got

    def advice(self) -> str:
        kinds = sorted({type_name(tensor.kind) for tensor in self.file.tensors.values() if len(tensor.shape) == 2})
        return f"its matrices are of {', '.join(kinds)}; load it with transformers' from_pretrained(folder, gguf_file=...)"

    def _activation(self) -> str:
        """Of all quantized layers: what this library wrote, else bitnet.cpp's int8 for the type that only it has, else none."""
        said = self.file.metadata.get(ACTIVATION_KEY)
        if said is None:
            return "int8" if any(stored.kind == I2_S for stored in self.file.tensors.values()) else "none"
        if said not in ACTIVATION_SCHEMES or ACTIVATION_SCHEMES.get(said).static:
            legal = ", ".join(name for name in ACTIVATION_SCHEMES if not ACTIVATION_SCHEMES.get(name).static)
            raise ValueError(
                f"{self.source} says {ACTIVATION_KEY}={said!r}, legal: {legal}; give it: import_model(..., activation='int8')"
            )
        return said

    def _layer(self, stored: Stored) -> Tensor | Found | Misfit:
        weight, factor = layer_weight(self.file, stored), self._further_scale(stored)
        if isinstance(weight, Misfit):
            return weight
        order = self._row_order(stored)
        if isinstance(weight, Tensor):
            weight = weight if order is None else weight[order]
            got = recognise(weight)
            if isinstance(got, Misfit):  # a layer of floats may be one that was never quantized
                return _times(weight, factor) if is_float(stored) else got
            scale = got.quantized.scale * factor
            if not bool(torch.isfinite(scale).all()):
                return Misfit(f"its scale times {_scale_of(stored)} is infinite")
            return got._replace(quantized=got.quantized._replace(scale=scale))
        scale = weight.scale * factor
        levels = weight.levels if order is None else weight.levels[order]
        scale = scale if order is None or scale.shape[0] == 1 else scale[order]
        return fit(Levels(levels, scale, weight.bits), self.outside)

    def _other(self, stored: Stored) -> Tensor:
        tensor, order = _times(floats(self.file, stored), self._further_scale(stored)), self._row_order(stored)
        if self.architecture.norm_offset and stored.name.endswith("norm.weight"):
            tensor = tensor.float() - self.architecture.norm_offset
        return tensor if order is None else tensor[order]

    def _further_scale(self, stored: Stored) -> float:
        """`<layer>.scale`, with which llama.cpp multiplies what comes out of a layer; 1 where there is none."""
        found = self.file.tensors.get(_scale_of(stored)) if stored.name.endswith(".weight") else None
        if found is None:
            return 1.0
        factor = float(floats(self.file, found)) if math.prod(found.shape) == 1 else None
        if factor is None or not 0 < factor < math.inf:
            got = f"shape {found.shape}" if factor is None else f"the value {factor}"
            raise ValueError(
                f"{self.source}: {found.name} has {got}; legal is one number above 0. Copy or download the file again"
            )
        return factor

    def _row_order(self, stored: Stored) -> Tensor | None:
        """Which row of the file is which row of the model, for queries and keys of permuted architectures."""
        heads = {".attn_q.": "num_attention_heads", ".attn_k.": "num_key_value_heads"}
        key = next((key for part, key in heads.items() if part in stored.name), None)
        if key is None or not self.architecture.permuted:
            return None
        rows, count = stored.shape[0], int(getattr(self.config, key))
        if rows % (2 * count):
            raise ValueError(f"{self.source}: {stored.name} has {rows} rows, which are no {count} heads of an even size")
        return torch.arange(rows, device="cpu").reshape(count, -1, 2).transpose(1, 2).reshape(-1)

    def _names(self, wanted: Wanted) -> dict[str, str]:
        """Name in the file -> name of the parameter."""
        import gguf  # pyright: ignore[reportMissingImports]

        numbers = {named: number for number, named in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(numbers[self.architecture.named], self.config.num_hidden_layers)
        names = {}
        for ours in wanted.shapes:
            module, _, leaf = ours.rpartition(".")
            theirs = table.get_name(module) or _bitnet_name(module)
            if theirs is not None:
                names[f"{theirs}.{leaf}"] = ours
        return names

    def _config(self) -> PreTrainedConfig:
        layers = said(self.file, "block_count")
        if not isinstance(layers, int) or not 1 <= layers <= len(self.file.tensors):
            raise ValueError(f"{self.source} says that it has {layers} layers, in {len(self.file.tensors)} tensors")
        config = self._bitnet_config() if self.architecture.activation else self._read_by_transformers()
        try:
            self._complete(config)
        except ValueError:
            raise
        except Exception as error:  # transformers' own checks raise a class of their own
            raise ValueError(f"{self.source}: its metadata does not describe a {type(config).__name__} ({error})") from error
        return config

    def _complete(self, config: PreTrainedConfig) -> None:
        head_size = said(self.file, "attention.key_length")
        if head_size is not None and hasattr(config, "head_dim"):
            config.head_dim = head_size  # transformers reads it for some architectures only
        set_attention(self.file, config)
        set_positions(self.file, config)

    def _read_by_transformers(self) -> PreTrainedConfig:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / self.file.path.name).write_bytes(self.file.without_weights())
            config = model_config(folder, gguf_file=self.file.path.name)
        config.name_or_path = ""
        return config

    def _bitnet_config(self) -> PreTrainedConfig:
        metadata = self.file.metadata
        fields: dict[str, Any] = {
            "vocab_size": said(self.file, "vocab_size") or metadata.get("tokenizer.ggml.tokens"),
            "hidden_size": said(self.file, "embedding_length"),
            "intermediate_size": said(self.file, "feed_forward_length"),
            "num_hidden_layers": said(self.file, "block_count"),
            "num_attention_heads": said(self.file, "attention.head_count"),
            "num_key_value_heads": said(self.file, "attention.head_count_kv"),
            "max_position_embeddings": said(self.file, "context_length"),
            "rms_norm_eps": said(self.file, "attention.layer_norm_rms_epsilon"),
            "hidden_act": self.architecture.activation,
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            **{f"{token}_token_id": metadata.get(f"tokenizer.ggml.{token}_token_id") for token in ("bos", "eos")},
        }
        try:
            return transformers.BitNetConfig(**fields)
        except Exception as error:  # transformers' own checks raise a class of their own
            raise ValueError(f"{self.source}: its metadata does not describe a BitNet model ({error})") from error


def require_gguf() -> None:
    """Raises ImportError that says how to install the package gguf."""
    try:
        import gguf  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("reading a GGUF file needs the package gguf: pip install 'hf_bitnet[gguf]'") from None


def _times(tensor: Tensor, factor: float) -> Tensor:
    """In float32, unless there is nothing to multiply with."""
    return tensor if factor == 1.0 else tensor.float() * factor


def _scale_of(stored: Stored) -> str:
    return stored.name.removesuffix("weight") + "scale"


def _scaled(name: str) -> str | None:
    """The weight that the tensor `name` is a further scale of."""
    return f"{name.removesuffix('.scale')}.weight" if name.endswith(".scale") else None


def _bitnet_name(module: str) -> str | None:
    if module == _HEAD:
        return "output"
    parts = module.split(".")
    theirs = _BITNET_NORMS.get(".".join(parts[-2:]))
    return None if theirs is None else f"blk.{parts[-3]}.{theirs}"
