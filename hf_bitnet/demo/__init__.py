"""Floor 7: the demo, from text to a packed 1.58-bit model on any computer, without a network and in a few minutes."""

from .run import run_demo

__all__ = ["run_demo"]
