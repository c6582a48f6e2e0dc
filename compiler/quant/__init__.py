"""Quantization of a policy: recipes, calibration, packs, and the same integer arithmetic in PyTorch."""

from duq.compiler.quant.fake import fake_quantize
from duq.compiler.quant.pack import LinearPack
from duq.compiler.quant.quantize import Quantization, quantize
from duq.compiler.quant.recipe import Recipe, load_recipe
from duq.compiler.quant.store import is_quantization, load_quantization, load_transforms, save_quantization
from duq.compiler.quant.transforms import LinearTransform

__all__ = [
    "LinearPack",
    "LinearTransform",
    "Quantization",
    "Recipe",
    "fake_quantize",
    "is_quantization",
    "load_quantization",
    "load_recipe",
    "load_transforms",
    "quantize",
    "save_quantization",
]
