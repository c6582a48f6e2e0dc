"""Observations to calibrate on and compare with, from the data that people have."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from duq.compiler.data.files import needs
from duq.compiler.data.lerobot_dataset import Dataset, open_dataset
from duq.compiler.data.quality import concerns
from duq.compiler.data.sampling import evenly, spread
from duq.compiler.errors import CalibrationError
from duq.runtime.errors import ObservationError
from duq.runtime.observations import NESTED, list_observations, nest, read_observations
from duq.runtime.reading import listed
from duq.runtime.robots import Camera, Robot, StatePart

DATASET_COUNT = 32  # observations of a dataset where nobody says how many
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_OTHER_FORMS = {  # a file in the folder -> what the folder is
    "meta_data/info.json": "a LeRobotDataset of version v1.x; convert it with LeRobot's convert_dataset scripts",
    "features.json": "a TFDS / RLDS data set; convert it to a LeRobotDataset, as openpi's "
                     "examples/libero/convert_libero_data_to_lerobot.py does",
    "*.hdf5": "of HDF5 episodes; convert them to a LeRobotDataset, as openpi's "
              "examples/aloha_real/convert_aloha_data_to_lerobot.py does",
}  # fmt: skip


@dataclass(frozen=True)
class CalibrationSet:
    """Observations, and what to tell about them.

    observations: dicts as a policy takes them. labels: of each, where it comes from. source: what was read.
    shown: lines that list the selection; empty where everything was taken. warnings: one line each.
    """

    observations: list[dict]
    labels: list[str]
    source: str
    shown: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RobotMapping:
    """Where a dataset keeps what a robot's observations consist of.

    sources: key of the observation -> names of features, of which the first that the dataset has is taken ("task" is the
    task's text). Keys are written as in an .npz file: "images/top" lies in the nested dict "images", "a//b" in "a",
    "observation/image" is one key. optional: keys that may be absent. channels_first: images to transpose to [3, H, W].
    """

    sources: Mapping[str, str | Sequence[str]]
    optional: Collection[str] = ()
    channels_first: Collection[str] = ()


def robot_mapping(robot: Robot | None) -> RobotMapping | None:
    """Where a dataset keeps a robot's observations: as its description says, else under the keys that the robot takes."""
    if robot is None:
        return None
    keys = {camera: _written(camera.key) for camera in robot.cameras}
    parts: tuple[Camera | StatePart, ...] = (*robot.cameras, *robot.state)
    own = {_written(part.key): [_written(key) for key in (part.key, *part.also)] for part in parts}
    return RobotMapping(
        robot.dataset or own | {robot.prompt_keys[0]: "task"},
        optional=[key for camera, key in keys.items() if not camera.required],
        channels_first=[key for camera, key in keys.items() if camera.layout == "CHW"],
    )


def _written(key: tuple[str, ...]) -> str:
    """A key as it is written in an .npz file."""
    return key[0] if len(key) == 1 else f"{key[0]}/{key[1]}" if key[0] in NESTED else f"{key[0]}//{key[1]}"


def load_calibration(
    path: str | Path, count: int | None = None, seed: int = 0, robot_mapping: RobotMapping | Mapping | None = None
) -> CalibrationSet:
    """Up to ``count`` observations from a LeRobotDataset folder, an .npz file, or a folder of .npz files (such as
    ``duq-serve --record`` writes). None: DATASET_COUNT of a dataset, all of .npz files.

    Those of a dataset are spread over its tasks, episodes and their time, by ``seed``; those of .npz files evenly.
    robot_mapping: for datasets, from their features to a robot's keys (RobotMapping, or its ``sources``); None: the
    features' names stay. Raises CalibrationError, which names the file or key and the fix.
    """
    path = Path(path)
    if os.path.lexists(path / "meta" / "info.json"):
        if robot_mapping is not None and not isinstance(robot_mapping, RobotMapping):
            robot_mapping = RobotMapping(robot_mapping)
        found = _from_dataset(open_dataset(path), DATASET_COUNT if count is None else count, seed, robot_mapping)
    else:
        _refuse_other_forms(path)
        found = _from_npz(path, count)
    found.warnings.extend(concerns(found.observations, count))
    return found


def check_source(path: str | Path) -> None:
    """Raises CalibrationError, before any long work, for what `load_calibration` cannot read: as far as beginnings tell."""
    path = Path(path)
    if os.path.lexists(path / "meta" / "info.json"):
        dataset = open_dataset(path)
        if any(feature["dtype"] == "video" for feature in dataset.features.values()):
            needs("av")
        return
    _refuse_other_forms(path)
    try:
        list_observations(path)
    except ObservationError as error:
        raise CalibrationError(f"calibration data {error}") from error


def _from_npz(path: Path, count: int | None) -> CalibrationSet:
    try:
        places = list_observations(path)
        picked = evenly(len(places), count)
        observations = read_observations([places[index] for index in picked])
    except ObservationError as error:
        raise CalibrationError(f"calibration data {error}") from error
    labels = [f"observation {index}" for index in picked]
    shown = [f"observation {index:>5}   {places[index][0].name}" for index in picked]
    source = f"{path}: {len(picked)} of {len(places):,} observations"
    return CalibrationSet(observations, labels, source, shown if len(picked) < len(places) else [])


def _from_dataset(dataset: Dataset, count: int, seed: int, mapping: RobotMapping | None) -> CalibrationSet:
    sources = {key: key for key in (*dataset.keys, "task")} if mapping is None else _sources(dataset, mapping)
    picked = spread(dataset, count, seed)
    read = dataset.read(picked, [name for name in dict.fromkeys(sources.values()) if name != "task"])
    labels, shown = [], []
    for index, observation in zip(picked, read, strict=True):
        episode, frame = dataset.locate(index)
        labels.append(f"episode {episode.index}, frame {frame}")
        shown.append(f"episode {episode.index:>5}   frame {frame:>5}   {observation['task']}")
    first_axis = () if mapping is None else mapping.channels_first
    observations = [
        nest({
            key: observation[name].transpose(2, 0, 1) if key in first_axis else observation[name]
            for key, name in sources.items()
        })
        for observation in read
    ]  # fmt: skip
    warnings = [f"{dataset.folder}: {name} is {reason} and is not read" for name, reason in dataset.left_out.items()]
    if mapping is not None:
        absent = [key for key in mapping.sources if key not in sources]
        warnings = [f"{dataset.folder}: has nothing for {key}; it is left out of the observations" for key in absent]
    warnings += dict.fromkeys(dataset.notes)
    form = f"LeRobotDataset {dataset.codebase_version}"
    source = f"{dataset.folder}: {form}, {len(picked)} of {len(dataset):,} frames, seed {seed}"
    return CalibrationSet(observations, labels, source, shown, warnings)


def _sources(dataset: Dataset, mapping: RobotMapping) -> dict[str, str]:
    """Key of the observation -> the feature it comes from."""
    there = (*dataset.keys, "task")
    sources = {}
    for key, candidates in mapping.sources.items():
        candidates = [candidates] if isinstance(candidates, str) else list(candidates)
        found = [name for name in candidates if name in there]
        if found:
            sources[key] = found[0]
        elif key not in mapping.optional:
            reasons = [f"{name} is {dataset.left_out[name]}" for name in candidates if name in dataset.left_out]
            raise CalibrationError(
                f"{dataset.folder}: has none of {', '.join(candidates)} for the robot's {key!r}"
                f"{''.join(f' ({reason})' for reason in reasons)}; it has {listed(there)}: say under [dataset] in the "
                "robot's TOML file which of them it is"
            )
    return sources


def _refuse_other_forms(path: Path) -> None:
    """Raises CalibrationError for what is neither here nor a form that is read."""
    name = re.sub(r"^(hf:/+)?(datasets/)?", "", path.as_posix())
    if not path.exists() and path.suffix != ".npz":
        hub = f"; of the Hugging Face Hub, download it: hf download --repo-type dataset {name} --local-dir {name}"
        raise CalibrationError(f"{path}: no such file or folder{hub if _HUB_ID.fullmatch(name) else ''}")
    if path.suffix in (".hdf5", ".h5"):
        raise CalibrationError(f"{path}: is {_OTHER_FORMS['*.hdf5'].removeprefix('of ')}")
    if not path.is_dir() or any(path.glob("*.npz")):
        return
    for pattern, what in _OTHER_FORMS.items():
        if any(path.glob(pattern)) or any(path.glob(f"*/{pattern}")):
            raise CalibrationError(f"{path}: is a folder {what}" if what.startswith("of ") else f"{path}: is {what}")
    inside = sorted(found.parents[1] for found in (*path.glob("*/meta/info.json"), *path.glob("*/*/meta/info.json")))
    if inside:
        raise CalibrationError(f"{path}: is no LeRobotDataset, but holds some; give one of them, such as {inside[0]}")
    raise CalibrationError(f"{path}: holds no .npz file of observations, and is no LeRobotDataset (meta/info.json)")
