"""Errors of opening and running a plan."""

from duq.plugins.errors import DuqError


class PlanError(DuqError):
    """The plan file is missing, damaged, of another format version, or made for another target."""


class EngineError(DuqError, RuntimeError):
    """The engine failed, gave actions that are not finite, or cannot be used any more: closed, failed before, or forked."""


class ObservationError(DuqError, ValueError):
    """An observation does not fit the plan: the key, what was found and what is expected are named."""


class MessageError(DuqError, ValueError):
    """A message to the server is not msgpack, or holds an array whose dtype, shape and bytes do not fit together."""


class RealtimeError(DuqError, ValueError):
    """The periods asked of a control loop do not fit each other or the policy's chunks."""
