"""Noise on weights during training, from a counter instead of a generator.

A random number is a hash of (key, index), and the key is a 0-dim tensor that whoever trains derives from (seed, step,
layer). So the micro-batches of a step, the second forward of activation checkpointing, every rank and a resumed run see the
same noise, torch's random state is untouched, and a compiled forward needs no new graph for a new step.

subset    Quant-Noise (arXiv 2004.07320): a random share of the weights is quantized, the others stay as they are
uniform   that share gets +-half a step of uniform noise in place of rounding (the pseudo-noise of arXiv 2104.09987)
gaussian  codes of w + sigma n (WinQ, arXiv 2605.17471); the only one whose forward stays on the grid
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .registry import Registry

Number = TypeVar("Number", int, Tensor)
_MASK = 0xFFFFFFFF


def mix(x: Number) -> Number:
    """int64 (...) or a number, below 2^32 -> the same, hashed: the finalizer `lowbias32` (public domain, C. Wellons)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def make_key(seed: int, step: int, layer: int) -> int:
    """The key of a layer in a step, 0 .. 2^32 - 1."""
    key = 0
    for number in (seed, step, layer):
        key = mix((key + number + 0x9E3779B9) & _MASK)
    return key


def uniform(shape: tuple[int, ...], key: Tensor, stream: int = 0) -> Tensor:
    """float32 of `shape` in (0, 1), on the device of `key` (int64, 0-dim)."""
    index = torch.arange(math.prod(shape), device=key.device)
    hashed = mix(mix(index & _MASK) ^ mix((key + stream) & _MASK))
    return ((hashed >> 8).float() + 0.5).mul_(2.0**-24).reshape(shape)


def normal(shape: tuple[int, ...], key: Tensor) -> Tensor:
    """float32 of `shape`, mean 0, variance 1 (Box and Muller)."""
    radius = uniform(shape, key).log_().mul_(-2).sqrt_()
    return uniform(shape, key, stream=1).mul_(2 * math.pi).cos_().mul_(radius)


@dataclass(frozen=True)
class WeightNoise:
    """One kind of noise, with its amount.

    Attributes:
        rate: share of the weights, 0..1. sigma: in units of the weights. Each kind reads one of them.
    """

    rate: float = 0.5
    sigma: float = 1e-3

    on_grid = False

    def latent(self, weight: Tensor, key: Tensor) -> Tensor:
        """float weight (N, K) -> what codes are made from, float32."""
        return weight

    def value(self, weight: Tensor, quantized: Tensor, step: Callable[[], Tensor], key: Tensor) -> Tensor:
        """What forward multiplies with.

        Args:
            weight, quantized: (N, K), the float weight and its quantized value.
            step: distance of two levels, float32, broadcasts to (N, K); called where it is needed.
        """
        return quantized


NOISES: Registry[type[WeightNoise]] = Registry("weight noise")


@NOISES.register("subset")
@dataclass(frozen=True)
class Subset(WeightNoise):
    def value(self, weight: Tensor, quantized: Tensor, step: Callable[[], Tensor], key: Tensor) -> Tensor:
        return torch.where(uniform(tuple(weight.shape), key) < self.rate, quantized, weight)


@NOISES.register("uniform")
@dataclass(frozen=True)
class Uniform(WeightNoise):
    def value(self, weight: Tensor, quantized: Tensor, step: Callable[[], Tensor], key: Tensor) -> Tensor:
        shape = tuple(weight.shape)
        noise = (uniform(shape, key, stream=1) - 0.5) * step()
        return torch.where(uniform(shape, key) < self.rate, weight + noise.to(weight.dtype), weight)


@NOISES.register("gaussian")
@dataclass(frozen=True)
class Gaussian(WeightNoise):
    on_grid = True

    def latent(self, weight: Tensor, key: Tensor) -> Tensor:
        return weight.float() + self.sigma * normal(tuple(weight.shape), key)
