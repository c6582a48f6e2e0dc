"""Quantisation of a policy: recipes, calibration, packs, and the same integer arithmetic in PyTorch."""
from compiler.quant.fake import fake_quantise
from compiler.quant.pack import LinearPack
from compiler.quant.quantize import Quantization, quantize
from compiler.quant.recipe import Recipe, load_recipe
from compiler.quant.store import is_quantization, load_quantization, load_transforms, save_quantization
from compiler.quant.transforms import LinearTransform

__all__ = [
    "LinearPack",
    "LinearTransform",
    "Quantization",
    "Recipe",
    "fake_quantise",
    "is_quantization",
    "load_quantization",
    "load_recipe",
    "load_transforms",
    "quantize",
    "save_quantization",
]
