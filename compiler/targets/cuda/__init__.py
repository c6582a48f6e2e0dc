"""The `cuda` target."""
from plugins.kernels import ARCHITECTURES as _ARCHITECTURES

ARCHITECTURES = tuple(_ARCHITECTURES)


def emit(graphs, writer, progress, options) -> dict:
    raise NotImplementedError
