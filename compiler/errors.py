"""Errors of the compiler. The command lines print them as one line and exit with code 2."""

from duq.plugins.errors import DuqError as DuqError


class CheckpointError(DuqError):
    """The checkpoint is missing, damaged, or does not describe a pi0 / pi0.5 policy."""


class RecipeError(DuqError, ValueError):
    """A quantization preset, recipe file, flag or environment variable is not understood."""


class CalibrationError(DuqError):
    """Calibration data is missing, of the wrong shape, or not finite."""


class PackError(DuqError):
    """A DuQuant pack does not fit the linear it is meant for."""


class GraphError(DuqError):
    """A compiler pass met a graph it does not understand (names the node)."""
