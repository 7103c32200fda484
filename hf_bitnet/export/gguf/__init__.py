"""GGUF files: "gguf" for llama.cpp, "i2_s" for bitnet.cpp."""

from .formats import I2S, Gguf

__all__ = ["I2S", "Gguf"]
