"""Robots as data: which keys of an observation are cameras and joints, and what the numbers of an action mean.

A robot is a small TOML file; `aloha.toml`, `droid.toml` and `libero.toml` beside this module take the very dicts that
openpi's policies take. A plan carries its robot's description, so the machine that runs it needs no file.

    name = "my_arm"
    default_prompt = "pick up the cube"                # when an observation has none

    [[cameras]]                                        # in the order of the model's image slots
    key = "wrist"                                      # ["images", "wrist"] for a nested dict
    layout = "HWC"                                     # HWC, CHW, or any (the default: CHW if the first axis is 3)
    required = true                                    # by default the first camera is, and the others may be absent

    [[state]]                                          # parts of the state, in the order of the model's inputs
    key = "joints"
    names = ["shoulder", "elbow", "gripper"]
    units = ["deg", "deg", "0..100"]

    [actions]
    names = ["shoulder", "elbow", "gripper"]
    units = ["deg", "deg", "0..100"]
    delta = [2, -1]                                    # two joints relative to the state, one absolute
    limits = { elbow = [0.0, 135.0] }                  # actions outside are reported, and sent as they are

    [[convert]]                                        # robot's units -> those the model was trained in, and back
    kind = "linear"                                    # or "negate", "aloha_gripper"
    dims = ["gripper"]
    low = 0.0                                          # low..high of the robot is 0..1 for the model
    high = 100.0

    [defaults]                                         # what the training config says, unless duq-compile is told otherwise
    delta_actions = true
    state_in_prompt = true                             # pi0.5 only; also adapt_to_pi
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from duq.runtime import checks
from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.errors import ObservationError, PlanError
from duq.runtime.reading import brief, brief_text, read_bytes, reading, reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROBOT_FILES = {file.stem: file for file in sorted(Path(__file__).parent.glob("*.toml"))}
ROBOT_NAMES = (*ROBOT_FILES, "none")
LARGEST = 1 << 20  # bytes of a description
MOST = 4096  # numbers of a state or an action
REMEDY = "write it as docs/robots.md says"
LAYOUTS = ("HWC", "CHW", "any")
KINDS = ("negate", "linear", "aloha_gripper")
SETTINGS = ("delta_actions", "adapt_to_pi", "state_in_prompt")  # what [defaults] may say

Key = tuple[str, ...]


@dataclass(frozen=True)
class Camera:
    """An image of the observation. `also`: other keys it may come under; `layout`: "HWC", "CHW" or "any"."""

    key: Key
    layout: str = "any"
    required: bool = False
    also: tuple[Key, ...] = ()

    @property
    def name(self) -> str:
        return ".".join(self.key)


@dataclass(frozen=True)
class StatePart:
    """A vector of the observation; its numbers follow those of the parts before it."""

    key: Key
    names: tuple[str, ...]
    units: tuple[str, ...] = ()
    also: tuple[Key, ...] = ()
    required = True


@dataclass(frozen=True)
class Conversion:
    """Between the robot's units and the model's, of the dims with these names. `when`: "always" or "adapt_to_pi"."""

    kind: str
    dims: tuple[str, ...]
    when: str = "always"
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Robot:
    """One robot's side of the policy. Arrays are float64, in the norm stats' units, unless said otherwise."""

    name: str
    cameras: tuple[Camera, ...]
    state: tuple[StatePart, ...]
    action_names: tuple[str, ...]
    action_units: tuple[str, ...] = ()
    delta: tuple[bool, ...] = ()  # the actions that are relative to the state of the same index, where deltas are used
    conversions: tuple[Conversion, ...] = ()
    ignored: tuple[Key, ...] = ()  # cameras of a nested dict that are accepted, but not looked through
    prompt_keys: tuple[str, ...] = ("prompt",)
    default_prompt: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings of training: a value, or {"pi0": ..., "pi05": ...}
    ask: tuple[str, ...] = ()  # settings in which this robot's published policies differ
    dataset: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # key -> features of a LeRobotDataset
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # name of an action -> lowest, highest

    @property
    def state_dim(self) -> int:
        return len(self.state_names)

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(name for part in self.state for name in part.names)

    @property
    def state_units(self) -> tuple[str, ...]:
        return tuple(unit for part in self.state for unit in (part.units or ("",) * len(part.names)))

    def images(self, observation: Mapping[str, Any]) -> dict[str, tuple[Any, Camera]]:
        """Slot -> what the observation holds under the camera's key, and the camera, of the cameras that are there.

        Raises ObservationError if one is absent that must be there, or a nested dict has a camera that is not the robot's.
        """
        if self._nested:
            self._check_unknown(observation)
        found = {}
        for slot, camera in zip(IMAGE_SLOTS, self.cameras, strict=False):
            key = _present(observation, camera)
            if key is not None:
                found[slot] = (_lookup(observation, key), camera)
        if not found:
            names = ", ".join(camera.name for camera in self.cameras)
            raise ObservationError(f"observation has no image; give one or more of {names}")
        return found

    def read_state(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The state in the robot's units, float64 [state_dim]."""
        parts = [self._read_part(observation, part) for part in self.state]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    @staticmethod
    def _read_part(observation: Mapping[str, Any], part: StatePart) -> np.ndarray:
        key = _present(observation, part)
        assert key is not None  # parts of the state are required
        holder = observation if len(key) == 1 else observation[key[0]]
        return checks.vector(holder, key[-1], len(part.names))

    def state_to_model(self, state: np.ndarray, adapt_to_pi: bool) -> np.ndarray:
        """The robot's units -> the model's, before normalization."""
        if self.conversions:
            state = state.copy()
        for conversion, dims, _ in self._placed:
            if dims and (adapt_to_pi or conversion.when == "always"):
                state[dims] = _TO_MODEL[conversion.kind](state[dims], conversion)
        return state

    def actions_to_robot(self, actions: np.ndarray, adapt_to_pi: bool) -> np.ndarray:
        """The model's units, after un-normalization and deltas, -> the robot's, [H, action_dim]."""
        for conversion, _, dims in self._placed:
            if dims and (adapt_to_pi or conversion.when == "always"):
                actions = actions.copy()
                actions[:, dims] = _TO_ROBOT[conversion.kind](actions[:, dims], conversion)
        return actions

    def actions_to_model(self, actions: np.ndarray, adapt_to_pi: bool) -> np.ndarray:
        """The inverse of `actions_to_robot`."""
        for conversion, _, dims in reversed(self._placed):
            if dims and (adapt_to_pi or conversion.when == "always"):
                actions = actions.copy()
                actions[:, dims] = _FROM_ROBOT[conversion.kind](actions[:, dims], conversion)
        return actions

    @cached_property
    def _placed(self) -> list[tuple[Conversion, list[int], list[int]]]:
        """Each conversion with its dims of the state and of the actions."""
        states, actions = self.state_names, self.action_names
        return [
            (
                each,
                [states.index(n) for n in each.dims if n in states],
                [actions.index(n) for n in each.dims if n in actions],
            )
            for each in self.conversions
        ]

    @cached_property
    def _nested(self) -> dict[str, tuple[set[str], list[str]]]:
        """Nested dict of cameras -> the keys that it may have, and those of the cameras."""
        known: dict[str, list[str]] = {}
        for camera in self.cameras:
            for key in (camera.key, *camera.also):
                if len(key) == 2:
                    known.setdefault(key[0], []).append(key[1])
        ignored = {outer: [key[1] for key in self.ignored if key[0] == outer] for outer in known}
        return {outer: ({*names, *ignored[outer]}, names) for outer, names in known.items()}

    def to_json(self) -> dict[str, Any]:
        """A description in plain JSON types; `from_json` is its inverse."""
        described = _plain(asdict(self))
        if not self.limits:  # so that a duq which knows none reads the robots that have none
            del described["limits"]
        return described

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Robot:
        """Raises PlanError if a key is unknown or missing."""
        unknown = set(data) - {each.name for each in fields(cls)}
        if unknown:
            raise PlanError(f"robot: the key {sorted(unknown)[0]!r} is unknown to this duq; upgrade it or compile again")
        try:
            return cls(
                **dict(data)
                | {
                    "cameras": tuple(Camera(**_tuples(camera)) for camera in data["cameras"]),
                    "state": tuple(StatePart(**_tuples(part)) for part in data["state"]),
                    "conversions": tuple(Conversion(**_tuples(each)) for each in data.get("conversions", ())),
                    "dataset": {key: tuple(values) for key, values in data.get("dataset", {}).items()},
                    "limits": {name: (low, high) for name, (low, high) in data.get("limits", {}).items()},
                    "ignored": tuple(tuple(key) for key in data.get("ignored", ())),
                    **{name: tuple(data.get(name, ())) for name in ("action_names", "action_units", "delta", "ask")},
                    "prompt_keys": tuple(data.get("prompt_keys", ("prompt",))),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"robot: its description is incomplete ({error}); compile again") from error

    def _check_unknown(self, observation: Mapping[str, Any]) -> None:
        for outer, (accepted, known) in self._nested.items():
            if outer in observation:
                for name in checks.mapping(observation, outer):
                    if name not in accepted:
                        raise ObservationError(
                            f"{outer}: unknown camera {checks.shown(name)}; {self.name} has {', '.join(known)}"
                        )


def _present(observation: Mapping[str, Any], part: Camera | StatePart) -> Key | None:
    """The one of a value's keys that the observation has; None where it has none and need not.

    Raises ObservationError if there are two, or none of one that must be there.
    """
    key = part.key
    if len(key) == 1 and key[0] in observation and not part.also:  # almost always
        return key
    found = [key for key in (part.key, *part.also) if _has(observation, key)]
    if len(found) > 1:
        both = " and ".join(".".join(key) for key in found)
        raise ObservationError(f"observation has {both}, which are two names of one thing; give one of them")
    if not found and part.required:
        key = part.key
        checks.required(observation if len(key) == 1 else checks.mapping(observation, key[0]), key[-1])
    return found[0] if found else None


def _has(observation: Mapping[str, Any], key: Key) -> bool:
    return key[0] in observation and (len(key) == 1 or key[1] in checks.mapping(observation, key[0]))


def _lookup(observation: Mapping[str, Any], key: Key) -> Any:
    return observation[key[0]] if len(key) == 1 else observation[key[0]][key[1]]


# --- conversions ------------------------------------------------------------------------------------------------------

# Units of ALOHA's gripper. Interbotix maps the opening (m, between the two positions) to 0..1 and the horn's angle (rad,
# between the two joint limits) to 0..1; Physical Intelligence maps encoder counts 2405..3110 of 4096, zero at 2048.
_GRIPPER_CLOSED_M, _GRIPPER_OPEN_M = 0.01844, 0.05800
_GRIPPER_CLOSED_RAD, _GRIPPER_OPEN_RAD = -0.6213, 1.4910
_PI_CLOSED_RAD, _PI_OPEN_RAD = 0.5476, 1.6296
_ARM_LENGTH_M, _HORN_RADIUS_M = 0.036, 0.022


def _gripper_to_pi(opening: np.ndarray, _: Conversion) -> np.ndarray:
    """ALOHA's linear gripper opening 0..1 -> the angle 0..1 of pi0's training data."""
    meters = opening * (_GRIPPER_OPEN_M - _GRIPPER_CLOSED_M) + _GRIPPER_CLOSED_M
    sine = (_HORN_RADIUS_M**2 + meters**2 - _ARM_LENGTH_M**2) / (2 * _HORN_RADIUS_M * meters)
    return (np.arcsin(np.clip(sine, -1, 1)) - _PI_CLOSED_RAD) / (_PI_OPEN_RAD - _PI_CLOSED_RAD)


def _gripper_from_pi(angle: np.ndarray, _: Conversion) -> np.ndarray:
    """pi0's gripper command, already radians above its closed position -> ALOHA's joint range 0..1."""
    return (angle + _PI_CLOSED_RAD - _GRIPPER_CLOSED_RAD) / (_GRIPPER_OPEN_RAD - _GRIPPER_CLOSED_RAD)


def _gripper_command_to_pi(position: np.ndarray, _: Conversion) -> np.ndarray:
    """The inverse of `_gripper_from_pi`."""
    return position * (_GRIPPER_OPEN_RAD - _GRIPPER_CLOSED_RAD) + _GRIPPER_CLOSED_RAD - _PI_CLOSED_RAD


_TO_MODEL = {
    "negate": lambda values, _: -values,
    "linear": lambda values, c: (values - c.low) / (c.high - c.low),
    "aloha_gripper": _gripper_to_pi,
}
_TO_ROBOT = {
    "negate": lambda values, _: -values,
    "linear": lambda values, c: values * (c.high - c.low) + c.low,
    "aloha_gripper": _gripper_from_pi,
}
_FROM_ROBOT = _TO_MODEL | {"aloha_gripper": _gripper_command_to_pi}  # of actions


# --- reading a robot --------------------------------------------------------------------------------------------------


def load_robot(name: str) -> Robot | None:
    """The robot of a built-in name or of a TOML file's path; None for "none", which takes bare model inputs only.

    Raises PlanError: unknown name, unreadable file, or a description that names what is wrong and where.
    """
    if name == "none":
        return None
    if name in ROBOT_FILES:
        return read_robot(ROBOT_FILES[name])
    if name.endswith(".toml"):
        return read_robot(Path(name))
    raise PlanError(f"robot {name!r} is unknown; there are {', '.join(ROBOT_NAMES)}, or give your own TOML file")


def read_robot(file: Path) -> Robot:
    """The robot that a TOML file describes. Raises PlanError that names the file, the key and what is expected there."""
    text = read_bytes(file, PlanError, REMEDY, limit=LARGEST)
    with reading(file, PlanError, REMEDY):
        try:
            data = tomllib.loads(text.decode())
        except ValueError as error:  # not UTF-8, or not TOML
            raise PlanError(f"{file}: is not TOML ({reason(error)})") from error
        try:
            return _robot(data)
        except _Fault as fault:
            raise PlanError(f"{file}: {brief_text(str(fault), 1000)}") from fault


class _Fault(Exception):
    """What is wrong with a description."""


def _robot(data: dict[str, Any]) -> Robot:
    _check_keys(data, "the file", {"name": str, "cameras": list, "state": list, "actions": dict},
                {"ignored": list, "convert": list, "defaults": dict, "dataset": dict, "default_prompt": str,
                 "prompt_keys": list})  # fmt: skip
    actions = data["actions"]
    _check_keys(actions, "[actions]", {"names": list}, {"units": list, "delta": list, "limits": dict})
    names = _names(actions, "[actions]")
    robot = Robot(
        name=data["name"],
        cameras=_cameras(data["cameras"]),
        state=tuple(_state_part(part, f"[[state]] {index}") for index, part in enumerate(data["state"])),
        action_names=names,
        action_units=_units(actions, names, "[actions]"),
        delta=_mask(actions.get("delta", []), len(names)),
        conversions=tuple(_conversion(each, f"[[convert]] {index}") for index, each in enumerate(data.get("convert", []))),
        ignored=tuple(_key(key, "ignored") for key in data.get("ignored", [])),
        prompt_keys=tuple(_list(data.get("prompt_keys", ["prompt"]), "prompt_keys")) or ("prompt",),
        default_prompt=data.get("default_prompt"),
        defaults={name: value for name, value in data.get("defaults", {}).items() if name != "ask"},
        ask=tuple(_list(data.get("defaults", {}).get("ask", []), "[defaults] ask")),
        dataset={key: tuple(_list(value, "[dataset]")) for key, value in data.get("dataset", {}).items()},
        limits={name: _limits(name, value, names) for name, value in actions.get("limits", {}).items()},
    )
    _check_robot(robot)
    return robot


def _cameras(listed: list[Any]) -> tuple[Camera, ...]:
    if not 1 <= len(listed) <= len(IMAGE_SLOTS):
        raise _Fault(f"[[cameras]]: there are {len(listed)}, the policies have slots for 1 to {len(IMAGE_SLOTS)}")
    cameras = []
    for index, camera in enumerate(listed):
        where = f"[[cameras]] {index}"
        _check_keys(camera, where, {"key": (str, list)}, {"layout": str, "required": bool, "also": list})
        layout = camera.get("layout", "any")
        if layout not in LAYOUTS:
            raise _Fault(f"{where}: layout is {brief(layout)}, one of {', '.join(LAYOUTS)}")
        also = tuple(_key(key, where) for key in camera.get("also", []))
        cameras.append(Camera(_key(camera["key"], where), layout, camera.get("required", index == 0), also))
    return tuple(cameras)


def _state_part(part: Any, where: str) -> StatePart:
    _check_keys(part, where, {"key": (str, list), "names": list}, {"units": list, "also": list})
    names = _names(part, where)
    also = tuple(_key(key, where) for key in part.get("also", []))
    return StatePart(_key(part["key"], where), names, _units(part, names, where), also)


def _conversion(each: Any, where: str) -> Conversion:
    _check_keys(each, where, {"kind": str, "dims": list}, {"when": str, "low": (int, float), "high": (int, float)})
    if each["kind"] not in KINDS:
        raise _Fault(f"{where}: kind is {each['kind']!r}, one of {', '.join(KINDS)}")
    if each.get("when", "always") not in ("always", "adapt_to_pi"):
        raise _Fault(f"{where}: when is {each['when']!r}, always or adapt_to_pi")
    if each["kind"] == "linear" and not ("low" in each and "high" in each and each["low"] != each["high"]):
        raise _Fault(f"{where}: a linear conversion needs low and high, two different numbers")
    low, high = (_number(each.get(key, default), f"{where}: {key}") for key, default in (("low", 0.0), ("high", 1.0)))
    if each["kind"] == "linear" and not 1e-6 <= abs(high - low):
        raise _Fault(f"{where}: low and high are {low:g} and {high:g}, which are too close to tell apart")
    return Conversion(each["kind"], tuple(_list(each["dims"], f"{where}: dims")), each.get("when", "always"), low, high)


def _number(value: float, what: str) -> float:
    """A number that a joint or a sensor may have; never NaN."""
    if not abs(value) <= 1e9:
        raise _Fault(f"{what} is {brief(value)}, expected a number from -1e9 to 1e9")
    return float(value)


def _check_robot(robot: Robot) -> None:
    """What only the whole description shows."""
    if not robot.state:
        raise _Fault("[[state]]: there is none; give the parts of the state")
    for kind, names in (("state", robot.state_names), ("action", robot.action_names)):
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise _Fault(f"the {kind} name {twice[0]!r} stands twice")
    known = {*robot.state_names, *robot.action_names}
    for conversion in robot.conversions:
        for name in conversion.dims:
            if name not in known:
                raise _Fault(f"[[convert]]: {name!r} is no name of the state or the actions")
    relative = [index for index, delta in enumerate(robot.delta) if delta]
    if relative and relative[-1] >= robot.state_dim:
        raise _Fault(f"[actions] delta: action {relative[-1]} is relative, but the state has {robot.state_dim} numbers")
    for name, value in robot.defaults.items():
        if name not in SETTINGS:
            raise _Fault(f"[defaults]: {name!r} is unknown, one of {', '.join(SETTINGS)}, ask")
        values = value.values() if isinstance(value, dict) and set(value) == {"pi0", "pi05"} else [value]
        if not all(isinstance(each, bool) for each in values):
            raise _Fault(f"[defaults] {name}: is {brief(value)}, expected true, false or {{ pi0 = ..., pi05 = ... }}")
    for name in robot.ask:
        if name not in SETTINGS:
            raise _Fault(f"[defaults] ask: {name!r} is unknown, of {', '.join(SETTINGS)}")
    if robot.defaults.get("delta_actions") not in (None, False) and not any(robot.delta):
        raise _Fault("[defaults] delta_actions: is on, but [actions] has no delta that says which they are")


def _check_keys(table: Any, where: str, needed: dict[str, Any], optional: dict[str, Any]) -> None:
    if not isinstance(table, dict):
        raise _Fault(f"{where}: is a {type(table).__name__}, expected a table")
    for key in needed:
        if key not in table:
            raise _Fault(f"{where}: lacks {key!r}")
    for key, value in table.items():
        expected = (needed | optional).get(key)
        if expected is None:
            raise _Fault(f"{where}: the key {key!r} is unknown, of {', '.join([*needed, *optional])}")
        if not isinstance(value, expected) or isinstance(value, bool) and expected is not bool:
            raise _Fault(f"{where}: {key} is {brief(value)}, expected {_type_names(expected)}")


def _type_names(expected: type | tuple[type, ...]) -> str:
    words = {str: "text", list: "a list", dict: "a table", bool: "true or false", int: "a number", float: "a number"}
    return " or ".join(dict.fromkeys(words[each] for each in (expected if isinstance(expected, tuple) else (expected,))))


def _key(key: Any, where: str) -> Key:
    parts = (key,) if isinstance(key, str) else tuple(key) if isinstance(key, list) else ()
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, str) and part for part in parts):
        raise _Fault(f"{where}: {brief(key)} is no key, expected text or a list of two for a nested dict")
    return parts


def _names(table: dict[str, Any], where: str) -> tuple[str, ...]:
    names = table["names"]
    if not 1 <= len(names) <= MOST or not all(isinstance(name, str) and name for name in names):
        raise _Fault(f"{where}: names must be one text for each of 1 to {MOST:,} numbers")
    return tuple(names)


def _units(table: dict[str, Any], names: tuple[str, ...], where: str) -> tuple[str, ...]:
    units = table.get("units", [])
    if units and (len(units) != len(names) or not all(isinstance(unit, str) for unit in units)):
        raise _Fault(f"{where}: there are {len(units)} units for {len(names)} names")
    return tuple(units)


def _mask(runs: list[Any], size: int) -> tuple[bool, ...]:
    """[True, False, ...], or openpi's notation: [6, -1] is six deltas and one absolute action; what is left is absolute."""
    if runs and all(isinstance(run, bool) for run in runs):
        mask = tuple(runs)
    elif all(type(run) is int and 0 < abs(run) <= MOST for run in runs) and len(runs) <= MOST:
        mask = tuple(run > 0 for run in runs for _ in range(abs(run)))
    else:
        raise _Fault(
            f"[actions] delta: is {brief(runs)}, expected true or false for each action, or counts such as [6, -1]"
        )
    if len(mask) > size:
        raise _Fault(f"[actions] delta: is about {len(mask)} actions, there are {size}")
    return mask + (False,) * (size - len(mask)) if any(mask) else ()


def _limits(name: str, value: Any, names: tuple[str, ...]) -> tuple[float, float]:
    """The lowest and the highest value of an action."""
    if name not in names:
        raise _Fault(f"[actions] limits: {brief(name)} is no action, of {', '.join(names)}")
    given = value if isinstance(value, list) else []
    numbers = [float(each) for each in given if type(each) in (int, float) and abs(each) <= sys.float_info.max]
    if len(numbers) != 2 or len(given) != 2 or not numbers[0] < numbers[1]:
        raise _Fault(f"[actions] limits: {name} is {brief(value)}, expected [lowest, highest], two finite numbers")
    return numbers[0], numbers[1]


def _list(value: Any, where: str) -> list[Any]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise _Fault(f"{where}: {brief(value)} must be a name or a list of them")
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of a JSON object as tuples, two levels deep."""
    return {
        key: tuple(tuple(each) if isinstance(each, list) else each for each in value) if isinstance(value, list) else value
        for key, value in data.items()
    }
