"""Format "onnx": a graph for onnxruntime whose quantized layers are blockwise products of 2, 4 or 8 bits."""

from .format import Onnx

__all__ = ["Onnx"]
