"""Floor 2: schemes. Importing a scheme's file registers it."""

from . import binary, integer, ternary
from .activation import ACTIVATION_SCHEMES, ActivationScheme
from .latents import latent_near, representable
from .quantized import Quantized
from .scales import SCALE_RULES, Grid
from .weight import GRANULARITIES, WEIGHT_SCHEMES, WeightQuantizer, WeightScheme, make_weight_quantizer

__all__ = [
    "ACTIVATION_SCHEMES",
    "GRANULARITIES",
    "SCALE_RULES",
    "WEIGHT_SCHEMES",
    "ActivationScheme",
    "Grid",
    "Quantized",
    "WeightQuantizer",
    "WeightScheme",
    "binary",
    "integer",
    "latent_near",
    "make_weight_quantizer",
    "representable",
    "ternary",
]
