"""The values of options that have a few. Those who use them define them too, and a test compares: importing them from there
would import PyTorch, for which --help and the shell's completion should not wait."""

from __future__ import annotations

TARGETS = ("cpu", "cuda", "tensorrt")  # compiler/pipeline.py
DEVICES = ("cpu", "cuda")  # compiler/quantize_cli.py
PRESETS = ("llm", "llm+expert-mlp", "all", "none")  # compiler/quant/recipe.py
SCHEMES = ("balanced", "duquant", "reference")
WEIGHT_BITS = ("4", "8", "16")
ACTIVATION_BITS = ("8", "0")
ACTIVATION_SCALES = ("per-token", "per-tensor", "per-channel")
BLOCK_SIZES = ("16", "32", "64", "128")
ROW_ROTATIONS = ("0", "restore")
LOOPS = ("graph", "unrolled")  # compiler/targets/tensorrt/options.py
FLOAT_TYPES = ("bf16", "fp16")
ROBOTS = ("aloha", "droid", "libero", "none", "lerobot")  # runtime/robots
LEROBOT_VERSIONS = ("0.3", "0.4", "0.5")  # compiler/checkpoint/lerobot.py
SOLVERS = ("euler", "ab2", "ab3")  # runtime/solver.py
ROTARIES = ("exact", "bfloat16", "auto")  # compiler/settings.py
VARIANTS = ("tiny", "small", "dummy", "full")  # compiler/checkpoint/synthetic
