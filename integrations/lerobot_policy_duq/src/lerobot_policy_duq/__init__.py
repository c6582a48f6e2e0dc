"""The policy type "duq" of LeRobot: plans made by `duq-compile --lerobot` or `duq-export-lerobot`."""

from .configuration_duq import DuqConfig

__all__ = ["DuqConfig"]
