"""Observations of five kinds of robots, in whatever form and state a robot's program may hand them over.

A plain observation holds numpy arrays and text. It is spoiled (NaN, other shapes, things that are no numbers), disguised (the same
numbers as lists, tensors, views, images of PIL, mappings of other classes), or both. What is taken gives the actions of its plain
form; and whatever it was, the policy answers the next good observation as before.
"""

from __future__ import annotations

import array
import collections
import copy
import datetime
import decimal
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import torch
from PIL import Image

from duq.runtime import Policy
from duq.runtime.errors import ObservationError
from duq.runtime.plan import Plan, PlanWriter
from duq.runtime.robots import load_robot
from duq.runtime.transforms import default_transforms
from tests.fuzz.judge import WRONG, Failure, judged
from tests.fuzz.plans import Attempt, check_actions, how, noise_of
from tests.support.observations import OBSERVATIONS, TOKENS, bare_observation, image

ARM = """\
name = "arm"
prompt_keys = ["prompt", "task"]

[[cameras]]
key = ["cameras", "front"]
layout = "any"

[[cameras]]
key = "wrist"
layout = "HWC"

[[state]]
key = "joints"
names = ["shoulder", "elbow"]
units = ["deg", "deg"]

[[state]]
key = "gripper"
names = ["gripper"]
units = ["0..1"]

[actions]
names = ["shoulder", "elbow", "gripper"]
units = ["deg", "deg", "0..1"]
delta = [2, -1]
limits = { shoulder = [-90.0, 90.0] }

[[convert]]
kind = "linear"
dims = ["gripper"]
low = -1.0
high = 3.0

[defaults]
delta_actions = true
state_in_prompt = false
"""


def arm() -> dict[str, Any]:
    cameras = {"front": image(3, (28, 28, 3))}
    return {"cameras": cameras, "wrist": image(4), "joints": np.array([10.0, -20.0]), "gripper": np.array([0.5]), **TOKENS}


def bare() -> dict[str, Any]:
    return bare_observation(state=np.linspace(-1, 1, 8, dtype=np.float32))


ROBOTS: dict[str, Callable[[], dict[str, Any]]] = {**OBSERVATIONS, "arm": arm, "bare": bare}


def write_plan_for(robot: str, folder: Path) -> Path:
    """cpu.plan, with a manifest for another robot."""
    (folder / "arm.toml").write_text(ARM)
    source, path = Plan(folder / "cpu.plan"), folder / f"{robot}.plan"
    described = load_robot({"arm": str(folder / "arm.toml"), "bare": "none"}.get(robot, robot))
    manifest = {**source.manifest, "robot": "none", "robot_description": None, "transforms": None, "norm_stats": None}
    if described is not None:
        manifest["robot"], manifest["robot_description"] = described.name, described.to_json()
        manifest["transforms"] = default_transforms(described, pi05=False, layout="openpi")
        sizes = {"state": described.state_dim, "actions": described.action_dim}
        statistics = {name: {"mean": [0.1] * size, "std": [0.7] * size} for name, size in sizes.items()}
        quantiles = {name: {"q01": [-1.0] * size, "q99": [1.5] * size} for name, size in sizes.items()}
        manifest["norm_stats"] = {name: statistics[name] | quantiles[name] for name in sizes} | {"epsilon": 1e-6}
    manifest = {key: value for key, value in manifest.items() if value is not None or key == "norm_stats"}
    with PlanWriter(path) as plan:
        for name in source.names:
            plan.write(name, source.read(name))
        plan.finish(manifest)
    return path


@contextmanager
def tries(robot: str, folder: Path) -> Iterator[Attempt]:
    """Tries of a robot's policy with observations and noises."""
    with Policy(write_plan_for(robot, folder), threads=1) as policy:
        good, noise = ROBOTS[robot](), noise_of(policy)
        expected = policy.infer(good, noise)["actions"]

        def attempt(seed: int) -> str:
            where, random = f"observations, {robot}, seed {seed}", Random(f"{robot} {seed}")
            given = _Given.of(ROBOTS[robot](), noise, random)
            error = judged(where, lambda: given.check(policy), (ObservationError,))
            judged(f"{where}, the good one after it", lambda: _check_equal(policy.infer(good, noise), expected), ())
            return how(error)

        yield attempt


def _check_equal(reply: Mapping[str, Any], expected: np.ndarray) -> None:
    if not np.array_equal(reply["actions"], expected):
        raise Failure(WRONG, f"actions are {reply['actions'].ravel()[:3]}, not {expected.ravel()[:3]}")


class _Given:
    """What a policy is given, and its plain form; `taken`: every change to it is one that has to be taken."""

    def __init__(self, observation: Any, noise: Any, plain: tuple[Any, Any] | None, taken: bool):
        self.observation, self.noise, self.plain, self.taken = observation, noise, plain, taken

    @classmethod
    def of(cls, observation: dict[str, Any], noise: np.ndarray, random: Random) -> _Given:
        _vary(observation, random)
        for _ in range(random.choice((0, 0, 1, 1, 2))):
            _spoil(observation, random)
        if random.random() < 0.15:
            noise = _spoiled(noise, random)
        if not all(_is_plain(each) for each in (observation, noise)):
            return cls(observation, noise, None, taken=False)
        plain, given = copy.deepcopy(observation), observation
        for holder, key in _arrays(given):
            if random.random() < 0.4:
                holder[key], _at(plain, given, holder)[key] = _disguised(holder[key], random)
        disguised_noise, plain_noise = _disguised(noise, random) if random.random() < 0.3 else (noise, noise)
        return cls(_as_mapping(given, random), disguised_noise, (plain, plain_noise), taken=True)

    def check(self, policy: Policy) -> None:
        """Raises Failure unless the reply is right; ObservationError where the observation is refused."""
        expected, refused = None, None
        if self.plain is not None:
            try:
                expected = policy.infer(*self.plain)["actions"]
            except ObservationError as error:
                refused = error
        try:
            reply = policy.infer(self.observation, self.noise)
        except ObservationError as error:
            if expected is not None and self.taken:
                raise Failure(WRONG, f"its plain form is taken, but not itself: {error}") from error
            raise
        check_actions(reply["actions"], policy)
        if refused is not None:
            raise Failure(WRONG, f"is taken, but its plain form is not: {refused}")
        if expected is not None:
            _check_equal(reply, expected)


def _is_plain(value: Any) -> bool:
    """Whether it is dicts of text, bools and numpy arrays of numbers."""
    if type(value) is dict:
        return all(type(key) is str and _is_plain(each) for key, each in value.items())
    return type(value) in (str, bool) or type(value) is np.ndarray and value.dtype.kind in "biuf" and value.size < 1 << 20


def _arrays(observation: Any) -> list[tuple[dict[str, Any], str]]:
    """Where its arrays are: (dict, key)."""
    found = []
    for key, value in observation.items():
        found += (
            _arrays(value) if isinstance(value, dict) else [(observation, key)] if isinstance(value, np.ndarray) else []
        )
    return found


def _at(copied: Any, original: Any, holder: Any) -> Any:
    """The dict of a copy that stands where `holder` does in the original."""
    if original is holder:
        return copied
    return next(copied[key] for key, value in original.items() if value is holder)


# --- plain observations -----------------------------------------------------------------------------------------------

_DTYPES = ("f4", "f8", "f2", "i1", "i8", "u1", "u2")


def _vary(observation: dict[str, Any], random: Random) -> None:
    """Other numbers, dtypes, sizes of images and prompts, all of which a robot may have."""
    for holder, key in _arrays(observation):
        value = holder[key]
        if value.ndim == 3 and random.random() < 0.4:
            holder[key] = _other_image(value, random)
        elif value.ndim == 1 and value.dtype.kind == "f" and random.random() < 0.5:
            numbers = np.random.default_rng(random.randrange(1 << 30)).uniform(0, 1, value.shape)
            holder[key] = (numbers * random.choice((1, 3, 100))).astype(random.choice(_DTYPES))
        elif value.ndim == 1 and value.dtype.kind == "i":
            holder[key] = value.astype(random.choice(("i4", "i8", "u1", "u4", "u8")))
    if random.random() < 0.4:
        for key in TOKENS:
            observation.pop(key, None)
        observation["prompt"] = random.choice(("pick up the cup", "", "öffne die Tür \U0001f600", "x" * 300, "a\nb\0c"))


def _other_image(value: np.ndarray, random: Random) -> np.ndarray:
    channels_first = value.shape[0] == 3
    height, width = random.choice(((28, 28), (40, 60), (7, 31), (56, 28)))
    found = image(random.randrange(1 << 30), (3, height, width) if channels_first else (height, width, 3))
    return random.choice(
        (found, found, found.astype("i8"), (found / 255).astype("f4"), found / 255, (found / 255).astype("f2"))
    )


# --- spoiled ----------------------------------------------------------------------------------------------------------


class Hostile:
    """Raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError(name)

    def __len__(self) -> int:
        raise ZeroDivisionError("len")

    def __repr__(self) -> str:
        raise ZeroDivisionError("repr")


class Claims:
    """Says that it is an array, and gives what it was made with."""

    def __init__(self, given: Any, shape: Any = (3,)):
        self.given, self.shape, self.dtype = given, shape, np.dtype("f4")

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


def _endless() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


def _wide(of: Any) -> Any:
    """2 ** 60 of a value, in a list of lists that are one another."""
    for _ in range(60):
        of = [of, of]
    return of


_THINGS: tuple[Callable[[], Any], ...] = tuple(
    (lambda value=value: value)
    for value in (
        None, True, 0, -1, 10**400, 1e400, float("nan"), 1 + 2j, "", "x", "\ud800", "x" * 20_000, "a" * 10**6, b"", b"\xff\xfe",
        b"abc", bytearray(3), memoryview(b"abc"), [], (), {}, set(), [[]], [[1.0], [1.0, 2.0]], [1, "a"], [None], ["a", "b"], ["x"],
        [1e400], [10**400], {"a": 1}, {1: 2}, {("a",): np.zeros(3)}, object, len, range(3), Ellipsis, datetime.date(2026, 1, 1),
        decimal.Decimal("NaN"), np.float32("nan"), np.str_("x"), np.datetime64("NaT"), np.array("x"), np.array(["x"]),
        np.array([b"x"]), np.array(None), np.array([None, 1], object), np.array([1 + 1j]), np.zeros(3, "M8[s]"), np.zeros(3, "V4"),
        np.zeros(3, [("x", "f4")]), np.zeros(0), np.zeros((0, 3)), np.zeros((1,) * 32), np.zeros((3, 0, 3), np.uint8),
        np.broadcast_to(np.float32(1), (1 << 40,)), np.broadcast_to(np.uint8(1), (1 << 20, 1 << 20, 3)),
        np.ma.masked_array([1.0, 2.0], [True, False]), np.arange(10**5),
    )
) + (
    object, Hostile, _endless, lambda: _wide(1.0), lambda: _wide(np.zeros(2)), lambda: _wide((1, np.zeros(2))),
    lambda: Claims(ValueError("no")), lambda: Claims(MemoryError()), lambda: Claims("x"),
    lambda: Claims(np.zeros(3, object)), lambda: Claims(None), lambda: Claims(np.zeros(3), (1 << 50,)), lambda: Claims(1, "shape"),
    lambda: Claims(RecursionError()), lambda: torch.zeros(3, device="meta"), lambda: torch.zeros(3, dtype=torch.complex64),
    lambda: torch.zeros(3).to_sparse(), lambda: torch.zeros(0),
    lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    lambda: torch.zeros(1).expand(1 << 40), lambda: Image.new("L", (28, 28)), lambda: Image.new("RGBA", (28, 28)),
    lambda: Image.new("P", (28, 28)), lambda: Image.new("F", (28, 28)), lambda: Image.new("1", (3, 3)), lambda: iter([1.0]),
    lambda: (each for each in [1.0]), lambda: array.array("f", [1.0, 2.0]), lambda: array.array("u", "xy"),
)  # fmt: skip


def _spoil(observation: dict[Any, Any], random: Random) -> None:
    """One value, or one key, of an observation becomes another, or goes."""
    holder: dict[Any, Any] = observation
    inner = [value for value in observation.values() if type(value) is dict and value]
    if inner and random.random() < 0.6:
        holder = random.choice(inner)
    if not holder:
        return
    key = random.choice(list(holder))
    kind = random.randrange(10)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        new = random.choice(
            (f"{key}x", "", "image", "state", "prompt", 5, None, ("a",), b"state", 1.5, "\ud800", "x" * 10**5)
        )
        holder[new] = holder.pop(key)
    elif kind < 5 or not isinstance(holder[key], np.ndarray) or holder[key].size > 1 << 20:
        holder[key] = random.choice(_THINGS)()
    else:
        holder[key] = _spoiled(holder[key], random)


_NUMBERS = (np.nan, np.inf, -np.inf, 1e38, -1e38, 1e308, 1e20, 1e16, 1e15, -1, 256, 1.5, 1e-40, -0.0, 2**31, 2**63)


def _spoiled(value: np.ndarray, random: Random) -> np.ndarray:
    """An array with numbers, a shape or a dtype that it should not have, or perhaps may."""
    kind = random.randrange(4)
    if kind < 2 and value.size:
        wide = value.astype("f8") if value.dtype.kind != "f" or random.random() < 0.3 else value.copy()
        with np.errstate(over="ignore"):
            wide.flat[random.randrange(value.size)] = random.choice(_NUMBERS)
        return wide
    if kind == 2:
        dtypes = ("?", "i1", "u1", "i8", "u8", "f2", "f4", "f8", "c8", "O", "U8", "S8", np.longdouble)
        with np.errstate(all="ignore"), suppress(ValueError):  # of text to numbers
            return value.astype(random.choice(dtypes))
        return value
    shapes: tuple[Callable[[], np.ndarray], ...] = (
        lambda: value[None], lambda: value[..., None], lambda: value.ravel(), lambda: value[:1], lambda: value[:0],
        lambda: np.concatenate([value, value]), lambda: value.T, lambda: np.repeat(value, 3, -1), lambda: value[1:],
        lambda: value.reshape(-1)[0], lambda: np.resize(value, (4,) * value.ndim), lambda: np.resize(value, 2000),
    )  # fmt: skip
    return random.choice(shapes)()


# --- disguised --------------------------------------------------------------------------------------------------------

Disguised = tuple[Any, np.ndarray]  # and the array that it stands for


class Subclass(np.ndarray):
    pass


class OnlyArray:
    """As JAX's arrays: not numpy's, but with `__array__`."""

    def __init__(self, value: np.ndarray):
        self._value, self.shape, self.dtype = value, value.shape, value.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._value

    def __len__(self) -> int:
        return len(self._value)


class OnlyDlpack:
    def __init__(self, value: np.ndarray):
        self._value = value

    def __dlpack__(self, **options: Any) -> Any:
        return self._value.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._value.__dlpack_device__()


class OnlyInterface:
    def __init__(self, value: np.ndarray):
        self._value, self.__array_interface__ = value, value.__array_interface__


def _strided(value: np.ndarray) -> np.ndarray:
    room = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)[..., ::2]
    room[...] = value
    return room


def _unaligned(value: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"x" + value.tobytes(), value.dtype, offset=1).reshape(value.shape)


def _read_only(value: np.ndarray) -> np.ndarray:
    value = value.copy()
    value.flags.writeable = False
    return value


_SAME: tuple[Callable[[np.ndarray], Any], ...] = (
    np.asfortranarray, lambda value: value[::-1].copy()[::-1], _strided, _unaligned, _read_only,
    lambda value: value.astype(value.dtype.newbyteorder(">")), lambda value: value.view(Subclass), np.ma.masked_array,
    OnlyArray, OnlyInterface, lambda value: OnlyDlpack(value.copy()), lambda value: tuple(value), lambda value: list(value),
    lambda value: memoryview(np.ascontiguousarray(value)),
)  # fmt: skip
_TENSORS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda tensor: tensor, lambda tensor: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor,
    lambda tensor: tensor.repeat(2, *(1,) * (tensor.dim() - 1))[: len(tensor)], lambda tensor: list(tensor),
    lambda tensor: torch.nn.Parameter(tensor, requires_grad=False), lambda tensor: tensor.flip(0).flip(0),
    lambda tensor: tensor.T.contiguous().T if tensor.dim() == 2 else tensor,
)  # fmt: skip


def _disguised(value: np.ndarray, random: Random) -> Disguised:
    """An array in another form."""
    kind = random.randrange(6)
    if not value.ndim or not value.size:
        return random.choice((value, OnlyArray(value) if value.ndim else value[()])), value
    if kind == 0:
        nested = value.tolist()
        return nested, np.array(nested)
    if kind == 1 and _is_of_torch(value):
        forms = _TENSORS[:1] if value.dtype.kind == "u" and value.itemsize > 1 else _TENSORS  # of which torch does little
        return random.choice(forms)(torch.from_numpy(np.ascontiguousarray(value))), value
    if kind == 2 and value.dtype.kind == "f":
        with np.errstate(all="ignore"):
            if random.random() < 0.5:
                tensor = torch.from_numpy(value.astype("f4")).to(torch.bfloat16)
                return tensor, tensor.float().numpy()
            narrow = value.astype(ml_dtypes.bfloat16)
        return narrow, narrow.astype(np.float32)
    if kind == 3 and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3 and value.shape[0] != 3:
        return Image.fromarray(np.ascontiguousarray(value)), value
    return random.choice(_SAME)(value), value


def _is_of_torch(value: np.ndarray) -> bool:
    try:
        torch.from_numpy(value[:0].copy())
    except TypeError:
        return False
    return True


class Custom(Mapping):  # type: ignore[type-arg]
    def __init__(self, held: dict[str, Any]):
        self._held = held

    def __getitem__(self, key: str) -> Any:
        return self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


_MAPPINGS = (
    lambda held: held, collections.OrderedDict, types.MappingProxyType, Custom, collections.UserDict,
    lambda held: collections.ChainMap({}, held), lambda held: dict(reversed(list(held.items()))),
)  # fmt: skip


def _as_mapping(observation: dict[str, Any], random: Random) -> Any:
    inner = {key: random.choice(_MAPPINGS)(value) if type(value) is dict else value for key, value in observation.items()}
    return random.choice(_MAPPINGS)(inner)
