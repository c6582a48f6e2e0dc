"""Quantisation of a policy: recipes, calibration, packs, and the same integer arithmetic in PyTorch."""
from compiler.quant.fake import fake_quantise
from compiler.quant.pack import LinearPack
from compiler.quant.quantize import Quantization, quantize
from compiler.quant.recipe import Recipe, load_recipe
from compiler.quant.transforms import LinearTransform

__all__ = ["LinearPack", "LinearTransform", "Quantization", "Recipe", "fake_quantise", "load_recipe", "quantize"]
