"""Engines and a driver that stand in for TensorRT's and NVIDIA's."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from duq.runtime.preprocess import ModelInputs

ACTIONS, IMAGE, STEPS, CHANNELS = (4, 32), 28, 3, 16


MANIFEST = {
    "num_steps": STEPS,
    "cameras": 3,
    "model": {
        "pi05": False, "action_horizon": ACTIONS[0], "action_dim": ACTIONS[1], "max_prompt_tokens": 40,
        "vision": {"image_size": IMAGE, "patch_size": 14},
        "llm": {"kv_heads": 1, "head_dim": CHANNELS, "width": 64, "depth": 1},
    },
}  # fmt: skip


TYPES = {"float": torch.float32, "int64": torch.int64, "bfloat16": torch.bfloat16}


TABLE = torch.arange(100)[:, None].expand(100, 64).bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)


def embed(tokens: np.ndarray) -> np.ndarray:
    return TABLE[tokens]


INPUTS = {"images": "float", "embeddings": "bfloat16", "state": "float"}


CACHES = {"key.0": "bfloat16", "value.0": "bfloat16"}


SIGNATURES = {
    "prefix": INPUTS | CACHES | {"image_features": "bfloat16"},
    "step": {"x": "float", "step": "int64"} | CACHES | {"x_next": "float"},
    "policy": INPUTS | {"x": "float", "x_next": "float"},
}
HISTORY = {"history": "float", "history_next": "float"}  # of a step with the solver ab2


class Memory:
    """Device memory as torch takes it."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


def signature(name: str, compute) -> dict[str, str]:
    """The tensors of an engine that computes this."""
    return SIGNATURES[name] | (HISTORY if compute is step_with_history else {})


class StandIn:
    """An engine: `compute` gets the bound tensors by name."""

    def __init__(self, name: str, compute):
        self.types, self.compute, self.bound, self.shapes = signature(name, compute), compute, {}, {}
        self.calls = 0

    def bind(self, name, address, shape):
        assert name in self.types and address % 8 == 0
        self.bound[name] = address
        if shape is not None:
            self.shapes[name] = shape

    def enqueue(self, stream):
        assert set(self.bound) == set(self.types)
        self.calls += 1
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            self.compute({name: self.tensor(name) for name in self.types}, self.shapes)

    def tensor(self, name):
        shapes = self.shapes | {"x_next": ACTIONS, "history_next": (1, *ACTIONS)}
        if name not in shapes:  # an output of the prefix; what TensorRT would infer
            cameras, prompt = self.shapes["images"][0], self.shapes["embeddings"][0]
            shapes[name] = (cameras * 4, 64) if name == "image_features" else (1, 1, cameras * 4 + prompt + 1, CHANNELS)
        dtype, count = TYPES[self.types[name]], int(np.prod(shapes[name]))
        return self.at(self.bound[name], count * dtype.itemsize).view(dtype).view(shapes[name])

    def at(self, address: int, size: int) -> torch.Tensor:
        return torch.as_tensor(Memory(address, size), device="cuda")


def prefix(t, shapes):
    tokens, cameras = t["embeddings"], t["images"].shape[0]
    t["image_features"].zero_()
    t["key.0"].zero_()
    t["value.0"].fill_(1)
    t["key.0"][0, 0, 0, 0].copy_(t["images"].view(-1)[0])
    t["key.0"][0, 0, 0, 1].copy_(t["images"].view(-1)[-1])
    t["key.0"][0, 0, -1, 0].copy_(tokens[-1, -1])
    t["key.0"][0, 0, -1, 1].copy_(t["state"][-1])
    t["value.0"][0, 0, -1, -1].copy_(t["state"][0])
    assert cameras == shapes["images"][0]


def step(t, shapes):
    x, x_next, key = t["x"], t["x_next"], t["key.0"]
    assert x.data_ptr() != x_next.data_ptr()
    torch.mul(x, 2, out=x_next)
    x_next.add_(t["step"])
    for value in (key[0, 0, 0, 0], key[0, 0, 0, 1], key[0, 0, -1, 0], key[0, 0, -1, 1], t["value.0"][0, 0, -1, -1]):
        x_next.add_(value)


def step_with_history(t, shapes):
    """ab2 after the first step, which has a history of zeros: x + 1.5 change - 0.5 history, where the change is step's."""
    x, history, history_next = t["x"], t["history"], t["history_next"]
    assert shapes["history"] == (1, *ACTIONS) and history.data_ptr() != history_next.data_ptr()
    step(t, shapes)
    history_next.copy_((t["x_next"] - x)[None])
    combined = history_next[0] * torch.where(t["step"] > 0, 1.5, 1.0) - 0.5 * history[0]
    torch.add(x, combined, out=t["x_next"])


def policy(t, shapes):
    torch.mul(t["x"], 2, out=t["x_next"])
    t["x_next"].add_(t["embeddings"][-1, -1]).add_(t["images"].view(-1)[-1]).add_(t["state"][-1])


def observation(cameras: int, prompt: int, seed: int) -> ModelInputs:
    """Small whole numbers, exact in every type; so are the pixels of black and white, -1 and 1."""
    random = np.random.default_rng(seed)
    mask = np.zeros(3, bool)
    mask[random.permutation(3)[:cameras]] = True
    return ModelInputs(
        images=255 * random.integers(0, 2, (3, IMAGE, IMAGE, 3), np.uint8),
        image_mask=mask,
        tokens=random.integers(0, 99, 40),
        token_mask=np.arange(40) < prompt,
        state=random.integers(-8, 8, ACTIONS[1]).astype(np.float32),
    )


def parts(inputs: ModelInputs):
    images, tokens = inputs.pixels()[inputs.image_mask].reshape(-1), inputs.tokens[inputs.token_mask]
    return images[0], images[-1], float(tokens[-1]), inputs.state[-1], inputs.state[0]


def expected_of_steps(inputs: ModelInputs, noise: np.ndarray) -> np.ndarray:
    x = noise
    for index in range(STEPS):
        x = 2 * x + index + sum(parts(inputs))
    return x


def expected_of_steps_with_history(inputs: ModelInputs, noise: np.ndarray) -> np.ndarray:
    x, before = noise, None
    for index in range(STEPS):
        change = x + index + sum(parts(inputs))
        x, before = x + (change if before is None else 1.5 * change - 0.5 * before), change
    return x


SIZES = [(3, 40), (1, 1), (2, 17), (1, 40), (3, 5)]


class Resource:
    def close(self) -> None:
        self.closed = True


def signatures_and_manifest(engines: dict[str, StandIn]) -> tuple[dict, dict]:
    """What Calls takes of engines: their tensors, and a manifest with the solver that they are of."""
    signatures = {name: {t: {"dtype": d} for t, d in engine.types.items()} for name, engine in engines.items()}
    solver = "ab2" if any(HISTORY.keys() <= engine.types.keys() for engine in engines.values()) else "euler"
    return signatures, MANIFEST | {"solver": solver}


class Block(Resource):
    def __init__(self, size: int):
        self.array = np.full(size, 0xA5, np.uint8)
        self.address = self.array.ctypes.data


class Graph(Resource):
    def __init__(self, work):
        self.launch = lambda stream: work()


class Stream(Resource):
    handle = 0

    def upload(self, to: int, source: int, size: int) -> None:
        ctypes.memmove(to, source, size)

    download = upload

    def clear(self, to: int, size: int) -> None:
        ctypes.memset(to, 0, size)

    def synchronize(self) -> None:
        pass

    def capture(self, work):
        return Graph(work)


class Event(Resource):
    def record(self, stream) -> None:
        pass

    record_in_graph = record

    def synchronize(self) -> None:
        pass

    def milliseconds_since(self, earlier) -> float:
        return 1.0
