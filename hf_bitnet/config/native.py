"""The config of transformers' own `bitnet` method, read as one of ours. Own."""

from __future__ import annotations

import copy
from typing import Any

from transformers.utils.quantization_config import BitNetQuantConfig

from .quantization import NATIVE_LOADING, NATIVE_METHOD, QUANT_METHOD, BitNetQuantizationConfig


class NativeBitNetConfig(BitNetQuantizationConfig):
    """Of a model whose layers compute in the arithmetic of transformers' own `bitnet` method; see `load_native`.

    It is saved as that method's config, without a word of ours. A copy by `fields()` is an ordinary config.

    Args:
        settings: the `quantization_config` of the checkpoint's config.json. Raises ValueError when transformers would.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        stock = BitNetQuantConfig(**{key: value for key, value in settings.items() if key != "quant_method"})
        self.divides = stock.linear_class == "bitlinear"
        self.online = not self.divides and stock.quantization_mode == "online"
        super().__init__(
            weight="ternary",
            weight_scale="absmean",
            granularity="tensor",
            sub_norm=["."] if stock.use_rms_norm else [],
            sub_norm_eps=1e-6 if stock.rms_norm_eps is None else stock.rms_norm_eps,
            form="train" if self.online else "packed",
        )
        self.native = {key: value for key, value in vars(stock).items() if key != "quant_method"}
        self.quant_method = NATIVE_LOADING  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """transformers' own settings."""
        return {"quant_method": NATIVE_METHOD, **copy.deepcopy(self.native or {})}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def fields(self) -> dict[str, Any]:
        """The fields of an ordinary config with the same meaning."""
        return super().fields() | {"quant_method": QUANT_METHOD}
