"""The root of every error duq raises on purpose.

Each layer derives its own from it (``compiler.errors``, ``runtime.errors``); a command line turns any of them
into one line on stderr and exit code 2.
"""


class DuqError(Exception):
    """Something the user can act on: the message names the file or value at fault and the fix."""


class DuqWarning(UserWarning):
    """Something done otherwise than it was asked for, and why; a command line prints it as one line on stderr."""


class LayoutError(DuqError, ValueError):
    """Values that do not fit the storage asked for, such as an INT4 weight outside -8..7."""


class KernelError(DuqError, RuntimeError):
    """A CUDA kernel that cannot be compiled, loaded or launched: a missing wheel, an unknown SM, a driver's error."""


class DeviceError(KernelError):
    """A call that the GPU's driver or library refused. status: its name, such as "CUDA_ERROR_OUT_OF_MEMORY"."""

    def __init__(self, message: str, status: str):
        super().__init__(message)
        self.status = status
