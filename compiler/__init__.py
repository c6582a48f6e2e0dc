"""The duq compiler: a pi0 / pi0.5 checkpoint becomes one engine.plan (see compiler/pipeline.py)."""

__version__ = "0.1.0"
