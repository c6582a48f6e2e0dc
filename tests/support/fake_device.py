"""A device ("meta" by name) that computes in main memory: code that mixes two devices fails on it without a GPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
TAKES_BOTH = {aten.index.Tensor, aten.index_put_.default, aten.copy_.default}


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device="meta"
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with FakeDevice():
            return function(*args, **(kwargs or {}))


class FakeDevice(TorchDispatchMode):
    """Runs operations on tensors of one device in main memory, and refuses those on tensors of two, as CUDA does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found, hosted = [], []

        def unwrap(value):
            if isinstance(value, OnDevice):
                found.append(value)
                return value.held
            if isinstance(value, torch.Tensor) and value.dim():
                hosted.append(value)
            return value

        plain_args, plain = tree_map(unwrap, args), tree_map(unwrap, dict(kwargs or {}))
        to_device = bool(found)
        if plain.get("device") is not None:
            to_device = torch.device(plain["device"]).type == "meta"
            plain["device"] = "cpu"
        if found and hosted and function not in TAKES_BOTH:
            raise RuntimeError(
                f"{function}: tensors on two devices, of {[tuple(each.shape) for each in hosted]} in main memory"
            )
        result = function(*plain_args, **plain)
        written = [each for each in found if each.held is result]
        if written or not to_device:
            return written[0] if written else result
        return tree_map(lambda value: OnDevice(value) if isinstance(value, torch.Tensor) else value, result)
