"""Floor 1: operations on plain tensors. `reference` defines them, `dispatch` picks a body, `cpu/` has the C++ ones."""

from .cpu.decoder import Described as DescribedLayer
from .cpu.decoder import Place as CachePlace
from .cpu.decoder import decode_layers
from .cpu.decoder import place_of as cache_place
from .decoder import DecoderLayer, decode_layer
from .dispatch import (
    autocast_dtype,
    bodies,
    describe_layer,
    explain,
    fixed_matmul,
    int_linear,
    int_matmul,
    mean_magnitudes,
    norm_quantize_rows,
    pack,
    pack_trits,
    packed_int_linear,
    packed_linear,
    packed_linears,
    quantize_columns,
    quantize_pack,
    quantize_rows,
    quantize_sign,
    quantize_weight,
    rms_norm,
    rotate,
    scale_rows,
    sign_pack,
    unpack,
    unpack_trits,
)
from .graph import is_recording
from .reference import Layout, PackedWeight, RowQuantization

__all__ = [
    "CachePlace",
    "DecoderLayer",
    "DescribedLayer",
    "Layout",
    "PackedWeight",
    "RowQuantization",
    "autocast_dtype",
    "bodies",
    "cache_place",
    "decode_layer",
    "decode_layers",
    "describe_layer",
    "explain",
    "fixed_matmul",
    "int_linear",
    "int_matmul",
    "is_recording",
    "mean_magnitudes",
    "norm_quantize_rows",
    "pack",
    "pack_trits",
    "packed_int_linear",
    "packed_linear",
    "packed_linears",
    "quantize_columns",
    "quantize_pack",
    "quantize_rows",
    "quantize_sign",
    "quantize_weight",
    "rms_norm",
    "rotate",
    "scale_rows",
    "sign_pack",
    "unpack",
    "unpack_trits",
]
