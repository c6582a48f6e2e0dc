"""What a plan's manifest may say: one schema, for who writes a plan and for who opens one.

A plan comes from elsewhere, and a robot does what it says. So every field is checked before it is used: that it is there, of its
type, within bounds that no policy exceeds, and in agreement with the others. The first error is reported in words, with the
field, its value and what is expected: `num_steps is 0; it should be greater than or equal to 1`.

A schedule, the other description in a `cuda` plan, has its schema in runtime/executors/schedule.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from duq.runtime.config import ROTARY
from duq.runtime.errors import PlanError
from duq.runtime.robots import LAYOUTS, ROBOT_NAMES
from duq.runtime.solver import SOLVERS

MAX_STEPS = 1000  # denoising steps, and the other bounds: above any policy, below what hangs or exhausts a machine
MAX_HORIZON = 1000
MAX_PROMPT = 4096
MAX_WIDTH = 1 << 20
MAX_DEPTH = 1000
MAX_VOCABULARY = 1 << 24
MAX_IMAGE = 2048
MAX_BYTES = 1 << 48
MAX_NESTING = 24  # of lists and objects in each other
MAX_SHOWN = 60  # characters of a value in an error

ENGINE_TENSORS = ("images", "embeddings", "state", "image_features", "x", "x_next", "history", "history_next", "step")
# and key.0, value.0, ...
ENGINE_TYPES = ("float", "int64", "bfloat16", "float16")

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # controls but white space; lone surrogates

M = TypeVar("M", bound=BaseModel)
Count = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
Size = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Sm = Annotated[int, Field(ge=10, le=999)]
Name = Annotated[str, Field(min_length=1)]
Numbers = Annotated[list[FiniteFloat], Field(min_length=1)]
Key = Annotated[list[Name], Field(min_length=1, max_length=2)]  # of an observation: one, or two into a nested dict


def complaint(words: str) -> PydanticCustomError:
    """An error of a check between fields, in these words."""
    return PydanticCustomError("duq", "{words}", {"words": words})


class Section(BaseModel):
    """A part of the manifest. A field that this version does not know is refused: it may change what the plan does."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Open(BaseModel):
    """A part whose further fields only inform people, or are checked elsewhere."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class Entry(Section):
    """Where an entry lies in the file, in bytes."""

    offset: Size
    bytes: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


# --- the model -----------------------------------------------------------------------------------------------------------


class Vision(Section):
    width: Count
    depth: Depth
    mlp_width: Count
    heads: Count
    image_size: Annotated[int, Field(ge=1, le=MAX_IMAGE)]
    patch_size: Annotated[int, Field(ge=1, le=MAX_IMAGE)]

    @model_validator(mode="after")
    def _is_whole(self) -> Vision:
        if self.image_size % self.patch_size:
            raise complaint(f"image_size is {self.image_size}, which is no multiple of patch_size {self.patch_size}")
        return self


class Gemma(Section):
    width: Count
    depth: Depth
    mlp_width: Count
    heads: Count
    kv_heads: Count
    head_dim: Count


class Model(Section):
    """The dimensions of the policy (runtime/config.py)."""

    pi05: bool
    vision: Vision
    llm: Gemma
    expert: Gemma
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY)]
    action_dim: Annotated[int, Field(ge=1, le=MAX_HORIZON)]
    action_horizon: Annotated[int, Field(ge=1, le=MAX_HORIZON)]
    max_prompt_tokens: Annotated[int, Field(ge=1, le=MAX_PROMPT)]
    state_dim: Annotated[int, Field(ge=1, le=MAX_HORIZON)] | None = None
    rotary: Literal[ROTARY] = "exact"  # type: ignore[valid-type]


# --- around the model ----------------------------------------------------------------------------------------------------


class Camera(Open):
    key: Key
    layout: Literal[LAYOUTS] = "any"  # type: ignore[valid-type]
    required: bool = False
    also: list[Key] = []


class StatePart(Open):
    key: Key
    names: Annotated[list[Name], Field(min_length=1)]
    units: list[str] = []
    also: list[Key] = []


class Conversion(Open):
    kind: Literal["negate", "linear", "aloha_gripper"]
    dims: list[Name]
    when: Literal["always", "adapt_to_pi"] = "always"
    low: FiniteFloat = 0.0
    high: FiniteFloat = 1.0

    @model_validator(mode="after")
    def _has_a_range(self) -> Conversion:
        if self.low == self.high:
            raise complaint(f"low and high are both {self.low}")
        return self


class RobotDescription(Open):
    """runtime/robots. Fields that are not known are refused there, by name."""

    name: Name
    cameras: Annotated[list[Camera], Field(min_length=1)]
    state: Annotated[list[StatePart], Field(min_length=1)]
    action_names: Annotated[list[Name], Field(min_length=1)]
    action_units: list[str] = []
    delta: list[bool] = []
    conversions: list[Conversion] = []
    ignored: list[Key] = []
    prompt_keys: Annotated[list[Name], Field(min_length=1)] = ["prompt"]
    default_prompt: str | None = None
    defaults: dict[str, Any] = {}
    ask: list[str] = []
    dataset: dict[str, list[str]] = {}
    limits: dict[Name, Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]] = {}

    @model_validator(mode="after")
    def _has_limits_of_its_actions(self) -> RobotDescription:
        for name, (low, high) in self.limits.items():
            if name not in self.action_names or low >= high:
                raise complaint(
                    f"limits of {shown(name)} are {low} to {high}, expected those of an action, from low to high"
                )
        return self


def _padding(value: Any) -> Any:
    if not isinstance(value, int) or not 0 <= value <= MAX_HORIZON:
        raise complaint(f"it is {shown(value)}, expected a bool, or an int from 0 to {MAX_HORIZON}")
    return value


class Transforms(Open):
    """runtime/transforms.py, which knows their values."""

    delta_actions: bool
    delta_mask: list[bool] | None
    adapt_to_pi: bool
    state_in_prompt: bool
    pad_state_in_prompt: Annotated[Any, AfterValidator(_padding)]
    default_prompt: str | None
    prompt_text: str
    resize: str


class Statistics(Section):
    """Of the state or the actions, a number for each of their dims. mode and epsilon: LeRobot's, of IDENTITY without numbers."""

    mode: Literal["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10", "IDENTITY"] | None = None
    epsilon: Annotated[FiniteFloat, Field(ge=0)] | None = None
    mean: Numbers | None = None
    std: Annotated[list[Annotated[FiniteFloat, Field(ge=0)]], Field(min_length=1)] | None = None
    q01: Numbers | None = None
    q99: Numbers | None = None
    min: Numbers | None = None
    max: Numbers | None = None
    q10: Numbers | None = None
    q90: Numbers | None = None

    @model_validator(mode="after")
    def _are_whole(self) -> Statistics:
        lists = {name: value for name in ("mean", "std", "q01", "q99", "min", "max", "q10", "q90")
                 if (value := getattr(self, name)) is not None}  # fmt: skip
        if not lists and self.mode != "IDENTITY":
            raise complaint("there are no statistics; expected mean and std, q01 and q99, or the like")
        if len({len(each) for each in lists.values()}) > 1:
            sizes = ", ".join(f"{name} {len(each)}" for name, each in lists.items())
            raise complaint(f"the statistics differ in length: {sizes}")
        for low, high in (("q01", "q99"), ("min", "max"), ("q10", "q90")):
            pairs = zip(lists.get(low, ()), lists.get(high, ()), strict=False)
            if (index := next((i for i, (a, b) in enumerate(pairs) if a > b), None)) is not None:
                raise complaint(f"{low} is above {high} at index {index}")
        return self


class NormStats(Section):
    """Absent (null) for a policy trained without; never empty, which would leave actions unscaled."""

    state: Statistics
    actions: Statistics
    epsilon: Annotated[FiniteFloat, Field(ge=0)] = 1e-6
    rule: Literal["openpi", "lerobot", "lerobot-0.3"] = "openpi"

    @model_validator(mode="after")
    def _follow_the_rule(self) -> NormStats:
        for name, stats in (("state", self.state), ("actions", self.actions)):
            if (stats.mode is None) != (self.rule == "openpi"):
                raise complaint(f"{name}.mode is {stats.mode}, which does not go with the rule {self.rule}")
            if stats.mode not in (None, "IDENTITY") and stats.epsilon is None:
                raise complaint(f"{name}.epsilon is missing")
        return self


class Checkpoint(Section):
    path: str
    layout: Literal["openpi", "lerobot"]
    form: str | None = None
    fingerprint: str = ""  # computed last


# --- the engine ----------------------------------------------------------------------------------------------------------


class Linear(Open):
    op: str
    weight_bits: Annotated[int, Field(ge=2, le=16)]
    activation_bits: Annotated[int, Field(ge=0, le=16)] | None
    bytes: Size
    sqnr_db: float | None = None  # NaN in older plans where nobody measured it


class Quantization(Section):
    recipe: dict[str, Any]
    linears: dict[str, Linear]


def _dimension(value: Any) -> Any:
    if not isinstance(value, str) and not (type(value) is int and 0 <= value <= MAX_BYTES):
        raise complaint(f"it is {shown(value)}, expected a size, or the name of one")
    return value


class Tensor(Section):
    dtype: Name
    shape: list[Annotated[Any, AfterValidator(_dimension)]] | None


class Graph(Open):
    """One half of the policy, or all of it: its tensors by name."""

    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    ops: dict[str, Size] = {}


class Engine(Graph):
    """A graph that the runtime binds memory for (runtime/executors/tensorrt.py)."""

    @model_validator(mode="after")
    def _is_known(self) -> Engine:
        for name, tensor in (self.inputs | self.outputs).items():
            if name not in ENGINE_TENSORS and name.split(".")[0] not in ("key", "value"):
                raise complaint(f"it has a tensor {shown(name)}, which this runtime knows nothing of")
            if tensor.dtype not in ENGINE_TYPES:
                raise complaint(f"{name}.dtype is {shown(tensor.dtype)}; expected one of {', '.join(ENGINE_TYPES)}")
        return self


class TensorRTSection(Graph):
    flavor: Name
    version: Name
    plugins_version: Size = 1
    engines: Annotated[list[Literal["prefix", "step", "policy"]], Field(min_length=1)]


class CudaGraphs(Open):
    """What all programs of a `cuda` plan have in common: the SMs that have PTX, the NVRTC that compiled them."""

    ptx: list[Sm] = []
    nvrtc: Annotated[str, Field(pattern=r"^[0-9]{1,3}[.][0-9]{1,3}$")] = "13.0"


def _graphs(manifest: Manifest) -> None:
    """The section `graphs` is the target's own."""
    sections, target = manifest.graphs or {}, manifest.target
    if target == "cuda":
        _nested(CudaGraphs, sections)
    for name, section in sections.items():
        if target == "tensorrt" and "/" not in name:
            for engine in _nested(TensorRTSection, section, name).engines:
                if f"{name}/{engine}" not in sections:
                    raise complaint(f"graphs.{name}/{engine} is missing")
        elif not (target == "cuda" and name in CudaGraphs.model_fields):
            _nested(Engine if target == "tensorrt" else Graph, section, name)


def _nested(kind: type[M], value: Any, *place: str) -> M:
    """A part whose schema depends on others'; its errors say where it lies."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise complaint(in_words(error, "graphs", *place)) from error


def _sorted(values: list[int]) -> list[int]:
    if sorted(set(values)) != values:
        raise complaint("they should be in order, each once")
    return values


class PolicySettings(Section):
    """What a plan says of the policy, whatever runs it. What has a default may be absent: older versions did not write it."""

    robot: Name
    num_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    solver: Literal[tuple(SOLVERS)] = "euler"  # type: ignore[valid-type]
    model: Model
    norm_stats: NormStats | None
    checkpoint: Checkpoint
    robot_description: RobotDescription | None = None
    transforms: Transforms | None = None
    training_config: str | None = None
    settings_from: dict[str, str] = {}
    ignored_settings: list[str] = []
    notes: list[str] = []
    lerobot_loop: dict[str, Any] | None = None  # of LeRobot's (runtime/lerobot_folder.py), which checks what it takes of it

    @model_validator(mode="after")
    def _names_its_robot(self) -> PolicySettings:
        described = self.robot_description
        if described is None and self.robot not in ROBOT_NAMES:
            raise complaint(f"robot {shown(self.robot)} is unknown, and the plan does not describe it")
        if described is not None and described.name != self.robot:
            raise complaint(f"robot is {shown(self.robot)}, but robot_description.name is {shown(described.name)}")
        return self


class Manifest(PolicySettings):
    """The whole of `manifest.json`."""

    format_version: Size
    entries: dict[Name, Entry]
    target: Literal["cpu", "cuda", "tensorrt"]
    cameras: Annotated[int, Field(ge=1, le=3)]
    sm: Annotated[list[Sm], AfterValidator(_sorted)] = []
    quantization: Quantization | None = None
    graphs: dict[str, Any] | None = None
    # what people want to know, and the options that the plan was made with
    created_by: dict[str, str] = {}
    float_images: bool = False
    gpu: list[str] = []
    timing: bool = True
    ptx: bool = True
    loop: Literal["unrolled", "graph"] = "graph"
    float_type: Literal["bf16", "fp16"] = "bf16"

    @model_validator(mode="after")
    def _agrees(self) -> Manifest:
        if not self.checkpoint.fingerprint:
            raise complaint("checkpoint.fingerprint is missing")
        if self.target != "cpu":
            self._check_gpu_entries()
        _graphs(self)
        return self

    def _check_gpu_entries(self) -> None:
        """What the executors of both GPU targets take for granted."""
        if not self.sm:
            raise complaint(f"sm is empty; a {self.target} plan is made for one or more")
        wanted = ["embedding", *(f"schedule/sm{sm}.json" for sm in self.sm if self.target == "cuda")]
        for name in wanted:
            if name not in self.entries:
                raise complaint(f"entries.{name} is missing, which a {self.target} plan for these sm has")
        found, expected = self.entries["embedding"].bytes, 2 * self.model.vocab_size * self.model.llm.width
        if found != expected:
            raise complaint(f"entries.embedding.bytes is {found}; 2 x model.vocab_size x model.llm.width is {expected}")


# --- reading -------------------------------------------------------------------------------------------------------------


def parse_manifest(text: str | bytes) -> dict[str, Any]:
    """The manifest of this text, checked, in plain JSON types. Raises PlanError that begins with the field."""
    data = parse_json(text)
    check(Manifest, data)
    return data


def parse_json(text: str | bytes) -> dict[str, Any]:
    """An object of JSON. PlanError for anything else, numbers that are not finite, and nesting without end."""
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise PlanError(f"is nested deeper than {MAX_NESTING}") from error
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise PlanError(f"is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise PlanError(f"is {shown(data)}, expected an object")
    _check_plain(data, ())
    return data


def _check_plain(value: Any, place: tuple[str | int, ...]) -> None:
    """Nothing in it that is not what it looks like: a number that is not finite, half a character, bottomless nesting."""
    if len(place) > MAX_NESTING:
        raise PlanError(f"{_dotted(place[:3])} is nested deeper than {MAX_NESTING}")
    if isinstance(value, float) and not math.isfinite(value) and place[-1:] != ("sqnr_db",):
        raise PlanError(f"{_dotted(place)} is {value}, expected a finite number")
    if isinstance(value, str):
        _check_text(value, place)
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_text(key, place)
            _check_plain(inner, (*place, key))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            _check_plain(inner, (*place, index))


def _check_text(value: str, place: tuple[str | int, ...]) -> None:
    """Text that can be printed: no halves of characters, and nothing that a terminal obeys."""
    if not value.isprintable() and _UNPRINTABLE.search(value):
        raise PlanError(f"{_dotted(place)} holds {shown(value)}, which is no text")


def check(kind: type[M], data: Any) -> M:
    """`data`, plain JSON types, as the section `kind`. Raises PlanError that begins with the field."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise PlanError(in_words(error)) from error


def in_words(error: ValidationError, *place: str) -> str:
    """The first error: field, value, and what is expected."""
    first = error.errors(include_url=False)[0]
    field = _dotted((*place, *first["loc"]))
    said = first["msg"].replace("Input", "it")
    said = said[:1].lower() + said[1:]
    match first["type"]:
        case "missing":
            return f"{field} is missing"
        case "extra_forbidden":
            return f"{field} is unknown to this duq; upgrade it"
        case "model_type" | "dict_type":
            said = "it should be an object"
        case "duq":
            return f"{field}: {first['msg']}" if field else first["msg"]
    return f"{field} is {shown(first['input'])}; {said}"


def _dotted(place: Iterable[str | int]) -> str:
    return ".".join(shown_key(part) for part in place)


def shown_key(part: str | int) -> str:
    """A key in an error, as it is where that is short and on one line."""
    text = str(part)
    return text if text.isprintable() and len(text) <= MAX_SHOWN else shown(text)


def shown(value: Any) -> str:
    """A value in an error: short, on one line."""
    match value:
        case dict():
            text = f"an object of {len(value)}"
        case list():
            text = f"a list of {len(value)}"
        case str():
            text = ascii(value)
        case _:
            text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
