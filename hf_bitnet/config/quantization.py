"""BitNetQuantizationConfig: what a model IS. Saved in its config.json under `quantization_config`. Own.

How a run trains is in `training.QATArguments`. Every field is plain data; unknown keys are refused; an override by regular
expression makes mixed precision a matter of data. Leaves out: modules, files.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..quantizers import WEIGHT_SCHEMES
from ..relaxations import RELAXATIONS
from .layer import (
    LAYER_FIELDS,
    VOCABULARY_FIELDS,
    LayerConfig,
    all_strings,
    check_number,
    check_pattern,
    list_of_patterns,
    validate_layer,
    validate_vocabulary,
    vocabulary_layer,
)

QUANT_METHOD = "hf_bitnet"
NATIVE_METHOD = "bitnet"
# names, inside transformers' registry, the quantizer of `load_native`
NATIVE_LOADING = "hf_bitnet_native"
FORMS = ("train", "packed")
# Plain transformers only warns about an unknown quant_method and loads float weights as a dense model, with other numbers.
# Its own method with a linear_class it does not know makes it stop, and the name is what its error prints.
FOREIGN_LINEAR_CLASS = "hf_bitnet: this checkpoint needs `pip install hf_bitnet`, and `import hf_bitnet` before from_pretrained"
# how a packed checkpoint stores ternary weights: four or five a byte. Not a field: a model in memory has one layout
STORAGES = ("bits", "trits")
# raised when a saved field changes its meaning; an older or newer file is then refused instead of misread
CONFIG_VERSION = 1

KEEP = "keep"


class BitNetQuantizationConfig(QuantizationConfigMixin):
    """Configuration of a quantized model.

    Args:
        weight: "binary" (1 bit), "ternary" (1.58), "int2", "int2_seq" (symmetric), "int4" or "int8".
        weight_scale: "absmean", "absmax", "threshold", "least_squares" or "learned"; None takes the scheme's default.
        granularity: "tensor", "channel" or "group"; None takes the scheme's default ("group" where a group_size is given).
        group_size: inputs per scale, for granularity "group".
        activation: "int8" (per token), "int4", "sign", "int8_asymmetric", "int8_static" (calibrated) or "none".
        ste: gradient estimator: "identity", "clipped", "tanh", "sigmoid" or "learnable".
        ste_threshold: for "clipped": levels beyond the outermost that still get a gradient.
        ste_temperature: steepness of the soft estimators; where the learnable one starts.
        relaxation: what serves while a schedule holds the strength below 1: "linear", "residual", "softmax" or "relay"
            (`relaxations.py` has the formulas).
        sub_norm: regular expressions of layers that get an RMS norm in front, for example [r"o_proj", r"down_proj"].
        sub_norm_eps: what these norms add to the mean square.
        keep: regular expressions of modules that stay in full precision, beside the default ones (heads, routers, ...).
        embeddings: what packs the tables of token embeddings too, and every head that is tied to one: a scheme ("int8", "int4",
            ...) with one scale a row, or a dict of weight, weight_scale and group_size. None leaves them in full precision.
        output_head: the same for an output head with a weight of its own; the dict may name activation and ste as well. Beside
            `embeddings`, in a model that ties the two, it must name the same codes. It gets no norm in front.
        overrides: {regular expression: "keep" | {field: value}}, first match wins. Fields: weight, weight_scale,
            granularity, group_size, activation, ste, sub_norm (True or False). An override quantizes a layer that would be
            kept by default.
        form: "train" (float weights, BitLinear) or "packed" (PackedBitLinear).
        min_coverage: `quantize_model` raises when less than this share of the parameters of linear maps is quantized.
        quantized_modules: filled in when a model is quantized: which modules are ("*" stands for any number). A checkpoint
            is restored by this list, so that it does not depend on the rules of the release that reads it.

    Regular expressions are searched in the dotted module name (`re.search`). Raises ValueError or TypeError with the legal
    values and the corrected call.
    """

    def __init__(
        self,
        weight: str = "ternary",
        weight_scale: str | None = None,
        granularity: str | None = None,
        group_size: int | None = None,
        activation: str = "int8",
        ste: str = "identity",
        ste_threshold: float = 0.5,
        ste_temperature: float = 4.0,
        relaxation: str = "linear",
        sub_norm: list[str] | None = None,
        sub_norm_eps: float = 1e-6,
        keep: list[str] | None = None,
        embeddings: str | dict[str, Any] | None = None,
        output_head: str | dict[str, Any] | None = None,
        overrides: dict[str, str | dict[str, Any]] | None = None,
        form: str = "train",
        min_coverage: float = 0.0,
        quantized_modules: list[str] | None = None,
        version: int = CONFIG_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        self._refuse_unknown(unknown)
        if quant_method != QUANT_METHOD:
            raise ValueError(
                f"this checkpoint's quant_method is {quant_method!r}, BitNetQuantizationConfig is for {QUANT_METHOD!r}; "
                "load a native 'bitnet' checkpoint with hf_bitnet.load_native(path)"
            )
        if version != CONFIG_VERSION:
            raise ValueError(
                f"the quantization config has version {version!r}, this hf_bitnet reads version {CONFIG_VERSION}; "
                "load it with the hf_bitnet release that wrote it (pip install 'hf_bitnet==...') and save it again"
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # the base's enum has no member for third parties
        self.version = version
        self.weight, self.weight_scale = weight, weight_scale
        self.granularity, self.group_size = granularity, group_size
        self.activation, self.ste = activation, ste
        self.ste_threshold, self.ste_temperature = ste_threshold, ste_temperature
        self.relaxation = relaxation
        self.sub_norm, self.sub_norm_eps = list_of_patterns("sub_norm", sub_norm), sub_norm_eps
        self.keep = list_of_patterns("keep", keep)
        self.embeddings, self.output_head = embeddings, output_head
        self.overrides = dict(overrides or {}) if isinstance(overrides, dict | None) else overrides
        self.form, self.min_coverage = form, min_coverage
        self.quantized_modules = quantized_modules
        # how transformers itself would load a model with this config; set by surgery, where there is such a way
        self.native: dict[str, Any] | None = None
        # of the checkpoint that this config was read from, or is going to be saved in
        self.storage = STORAGES[0]
        self.post_init()

    @classmethod
    def _field_names(cls) -> tuple[str, ...]:
        code = BitNetQuantizationConfig.__init__.__code__
        return code.co_varnames[1 : code.co_argcount]

    @classmethod
    def _refuse_unknown(cls, unknown: dict[str, Any]) -> None:
        if QUANT_METHOD in unknown:
            raise ValueError(
                "this is the saved form of the config (from a config.json); use BitNetQuantizationConfig.from_dict(...), or "
                "config.fields() for the arguments of the constructor"
            )
        if unknown:
            name = next(iter(unknown))
            fields = cls._field_names()
            close = get_close_matches(name, fields, n=1)
            hint = f" Did you mean {close[0]}={unknown[name]!r}?" if close else ""
            raise ValueError(f"BitNetQuantizationConfig has no field {name!r}; fields: {', '.join(fields)}.{hint}")

    def post_init(self) -> None:
        """Validates every field. Raises ValueError or TypeError."""
        for field in ("weight", "activation", "ste", "relaxation", "form"):
            if not isinstance(getattr(self, field), str):
                raise TypeError(
                    f"{field} must be a string, got {getattr(self, field)!r}; for example "
                    "BitNetQuantizationConfig(weight='ternary', activation='int8')"
                )
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}; legal: 'train' (float weights) or 'packed'")
        RELAXATIONS.get(self.relaxation)
        check_number("ste_threshold", self.ste_threshold, lowest=0.0)
        if check_number("ste_temperature", self.ste_temperature, lowest=0.0) == 0.0:
            raise ValueError("ste_temperature must be above 0; 4.0 is a good start")
        check_number("sub_norm_eps", self.sub_norm_eps, lowest=0.0)
        check_number("min_coverage", self.min_coverage, lowest=0.0, highest=1.0)
        if not (self.quantized_modules is None or all_strings(self.quantized_modules)):
            raise TypeError(f"quantized_modules must be a list of module names or None, got {self.quantized_modules!r}")
        validate_layer(self._base())
        for field in VOCABULARY_FIELDS:
            if (value := getattr(self, field)) is not None:
                validate_vocabulary(field, value, self._base())
        if not isinstance(self.overrides, dict):
            raise TypeError(
                f"overrides must be a dict of patterns, got {type(self.overrides).__name__}; for example "
                "overrides={r'down_proj': {'weight': 'int4'}, r'layers\\.0\\.': 'keep'}"
            )
        for pattern, change in self.overrides.items():
            check_pattern("overrides", pattern)
            layer = self._overridden(pattern, change)
            if layer is None:
                continue
            try:
                validate_layer(layer)
            except (ValueError, TypeError) as error:
                raise type(error)(f"overrides[{pattern!r}]: {error}") from None

    def tied_head_layer(self) -> LayerConfig | None:
        """How a head is quantized that is tied to a table: with the table's codes. None when tables are kept.

        Raises ValueError when `output_head` asks for other codes, or for codes that `embeddings` does not have.
        """
        table, head = self.vocabulary_layer("embeddings"), self.vocabulary_layer("output_head")
        if table is None and head is None:
            return None
        if table is None or (head is not None and head.quantizer() != table.quantizer()):
            raise ValueError(
                "the output head of this model is tied to its embeddings, so the two have the same codes, but "
                f"embeddings={self.embeddings!r} and output_head={self.output_head!r}; write embeddings="
                f"{(self.output_head if table is None else self.embeddings)!r} alone, which quantizes both"
            )
        base = self._base() if head is None else head
        weight = {name: getattr(table, name) for name in ("weight", "weight_scale", "granularity", "group_size")}
        return replace(base, **weight, sub_norm=False)

    def vocabulary_layer(self, field: str) -> LayerConfig | None:
        """What `embeddings` or `output_head` (the `field`) says; None where it says nothing."""
        value = getattr(self, field)
        return None if value is None else vocabulary_layer(field, value, self._base())

    def fields(self) -> dict[str, Any]:
        """The arguments that make an equal config: `BitNetQuantizationConfig(**config.fields())`. A deep copy."""
        return copy.deepcopy({name: getattr(self, name) for name in self._field_names()})

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds. `from_dict` reads it back.

        All fields are under the key "hf_bitnet". Around it stands what plain transformers reads: its own online bitnet
        settings where they mean the same (`native`), else a setting that makes it stop instead of loading a wrong model.
        """
        around = {"linear_class": FOREIGN_LINEAR_CLASS} if self.native is None else copy.deepcopy(self.native)
        # pairs, not a dict: transformers sorts the keys of config.json, and here the first match wins
        overrides = [[pattern, change] for pattern, change in self.fields()["overrides"].items()]
        storage = {} if self.storage == STORAGES[0] else {"storage": self.storage}
        return {"quant_method": NATIVE_METHOD, **around, QUANT_METHOD: self.fields() | {"overrides": overrides} | storage}

    @classmethod
    def from_dict(  # type: ignore[override]
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Reads a saved config, or a plain dict of fields. Raises ValueError on an unknown field or another version."""
        ours = config_dict.get(QUANT_METHOD, config_dict)
        if not isinstance(ours, dict):
            raise ValueError(f"quantization_config[{QUANT_METHOD!r}] of config.json must hold the settings, got {ours!r}")
        pairs = ours.get("overrides")
        if isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            ours = ours | {"overrides": dict(pairs)}
        storage = ours.get("storage", STORAGES[0])
        if storage not in STORAGES or (storage != STORAGES[0] and ours.get("form") != "packed"):
            raise ValueError(
                f"the quantization_config of config.json says storage={storage!r}, form={ours.get('form')!r}; legal: "
                f"{' or '.join(map(repr, STORAGES))}, the latter for form='packed'. Copy the file again, or load it with the "
                "hf_bitnet release that wrote it"
            )
        ours = {name: value for name, value in ours.items() if name != "storage"}
        made: Any = super().from_dict(ours, return_unused_kwargs, **kwargs)
        (made[0] if return_unused_kwargs else made).storage = storage
        return made

    def get(self, name: str, default: Any = None) -> Any:
        """A field by its name. transformers asks for `quant_method` this way when it is given `config=model.config`."""
        return getattr(self, name, default)

    def __repr__(self) -> str:
        defaults = BitNetQuantizationConfig().fields()
        changed = {name: value for name, value in self.fields().items() if value != defaults[name]}
        return f"BitNetQuantizationConfig({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def _base(self) -> LayerConfig:
        return LayerConfig(self.weight, self.weight_scale, self.granularity, self.group_size, self.activation, self.ste, False)

    def _overridden(self, pattern: str, change: Any) -> LayerConfig | None:
        if change == KEEP:
            return None
        if not isinstance(change, dict):
            raise TypeError(f"overrides[{pattern!r}] is {change!r}; legal: 'keep' or a dict such as {{'weight': 'int4'}}")
        for field in change:
            if field not in LAYER_FIELDS:
                raise ValueError(f"overrides[{pattern!r}] names {field!r}; fields of a layer: {', '.join(LAYER_FIELDS)}")
        fields = {name: getattr(self._base(), name) for name in LAYER_FIELDS}
        if "weight" in change and change["weight"] != self.weight:
            # another scheme comes with its own scale rule and granularity, unless they are named too
            fields |= {"weight_scale": None, "granularity": None, "group_size": None}
        if "granularity" in change:
            fields["group_size"] = None
        return LayerConfig(**(fields | change))

    def is_kept(self, name: str) -> bool:
        """Whether the user keeps module `name` in full precision."""
        change = self._override(name)
        return change == KEEP if change is not None else any(re.search(pattern, name) for pattern in self.keep)

    def is_forced(self, name: str) -> bool:
        """Whether an override asks for `name` to be quantized even if the defaults would keep it."""
        return isinstance(self._override(name), dict)

    def layer(self, name: str) -> LayerConfig:
        """The configuration of layer `name` (dotted module name)."""
        change = self._override(name)
        layer = self._base()
        if isinstance(change, dict):
            overridden = self._overridden(name, change)
            assert overridden is not None
            layer = overridden
            if "sub_norm" in change:
                return layer
        normed = any(re.search(pattern, name) for pattern in self.sub_norm)
        return LayerConfig(**{**{f: getattr(layer, f) for f in LAYER_FIELDS}, "sub_norm": normed})

    def _override(self, name: str) -> str | dict[str, Any] | None:
        return next((change for pattern, change in self.overrides.items() if re.search(pattern, name)), None)

    @property
    def bits(self) -> float:
        """Bits per weight of the main scheme: 1, 1.58, 2, 4 or 8."""
        return WEIGHT_SCHEMES.get(self.weight).bits

    @classmethod
    def bitnet_b158(cls, **fields: Any) -> BitNetQuantizationConfig:
        """W1.58A8: ternary, one absmean scale a tensor, int8 per token (arXiv 2402.17764)."""
        return cls(**{"weight": "ternary", "weight_scale": "absmean", "granularity": "tensor", **fields})

    @classmethod
    def w1a8(cls, **fields: Any) -> BitNetQuantizationConfig:
        """1-bit weights, one scale a channel (arXiv 2310.11453)."""
        return cls(**{"weight": "binary", "granularity": "channel", **fields})

    @classmethod
    def w2a8(cls, **fields: Any) -> BitNetQuantizationConfig:
        """2-bit weights on the symmetric grid with a learned scale a channel (ParetoQ, arXiv 2502.02631)."""
        return cls(**{"weight": "int2_seq", "weight_scale": "learned", "granularity": "channel", **fields})

    @classmethod
    def w4a8(cls, **fields: Any) -> BitNetQuantizationConfig:
        """4-bit weights, one absmax scale a channel."""
        return cls(**{"weight": "int4", "granularity": "channel", **fields})

    @classmethod
    def w8a8(cls, **fields: Any) -> BitNetQuantizationConfig:
        """8-bit weights, one absmax scale a channel."""
        return cls(**{"weight": "int8", "granularity": "channel", **fields})
