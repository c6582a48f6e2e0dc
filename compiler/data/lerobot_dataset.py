"""Reads LeRobotDataset folders of the versions v3.0 (LeRobot >= 0.4) and v2.1 (before, and openpi's).

meta/info.json                     version, features, where data and videos are
meta/episodes..., meta/tasks...    parquet (v3.0) or JSON lines (v2.1)
data/...parquet                    a row a frame: its features but videos, its time and task
videos/...mp4                      a video a camera, of one episode (v2.1) or many (v3.0)
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from duq.compiler.data.files import Table, check_fields, read_json, read_json_lines
from duq.compiler.data.video import decode_frames
from duq.compiler.errors import CalibrationError
from duq.runtime.reading import brief, listed, reading, reason

VERSIONS = ("v3.0", "v2.1")
LONGEST_NAME = 200  # of a feature
MOST_NUMBERS = 1 << 24  # of a feature of a frame
BOOKKEEPING = frozenset({"timestamp", "frame_index", "episode_index", "index", "task_index"})
_NUMBERS = frozenset(
    ("bool", "float16", "float32", "float64") + tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
)
_TEMPLATE = re.compile(r"(?:[^{}\0]|\{\w+(?::0?\d{0,2}d?)?\})+")  # "data/chunk-{chunk_index:03d}/file.parquet"
_AGAIN = "download the dataset again, all files of it"


@dataclass(frozen=True)
class Episode:
    """One episode. Its frames are ``start`` to ``start + length - 1``, counted over the whole dataset.

    tasks: texts, in no particular order; empty where the metadata do not say. data: the parquet file.
    videos: camera -> (mp4 file, time in it at which the episode begins, in seconds).
    """

    index: int
    start: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    videos: dict[str, tuple[Path, float]]


class Dataset:
    """An opened LeRobotDataset folder. Frames are numbered over all episodes, from 0.

    Attributes:
        folder: as given.
        codebase_version: "v3.0" or "v2.1".
        features: name -> {"dtype", "shape", ...}, as in meta/info.json.
        tasks: task_index -> text.
        episodes: list of Episode, by index.
        camera_keys: names of the features that `read` returns as images.
        keys: names of all features that `read` returns. Actions, rewards and what numbers the frames are left out.
        left_out: name -> why it cannot be read, such as a depth map.
        notes: lines about what `read` had to put right.
    """

    def __init__(self, folder: Path, version: str, features: dict, tasks: dict[int, str], episodes: list[Episode]):
        self.folder, self.codebase_version = folder, version
        self.features, self.tasks, self.episodes = features, tasks, episodes
        inputs = [name for name in features if _is_input(name)]
        reasons = {name: _unreadable(features[name]) for name in inputs}
        self.left_out = {name: reason for name, reason in reasons.items() if reason}
        self.keys = [name for name in inputs if name not in self.left_out]
        self.camera_keys = [name for name in self.keys if features[name]["dtype"] in ("video", "image")]
        self.notes: list[str] = []
        self._starts = np.array([episode.start for episode in episodes])
        self._begins: dict[Path, float] = {}  # video file -> the time in it at which its first episode begins
        for file, begin in (video for episode in episodes for video in episode.videos.values()):
            self._begins[file] = min(begin, self._begins.get(file, begin))

    def __len__(self) -> int:
        """Frames in all episodes."""
        return self.episodes[-1].start + self.episodes[-1].length

    def locate(self, index: int) -> tuple[Episode, int]:
        """The episode of a frame, and the frame's number in it."""
        if not 0 <= index < len(self):
            raise CalibrationError(f"{self.folder}: has no frame {index}; it has {len(self)}")
        episode = self.episodes[int(np.searchsorted(self._starts, index, side="right")) - 1]
        return episode, index - episode.start

    def read(self, indices: Sequence[int], keys: Iterable[str] | None = None) -> list[dict]:
        """The observations of these frames, in their order.

        keys: features to read, of ``self.keys``; None: all. Each observation maps them to images uint8 RGB [H, W, 3],
        numbers as numpy arrays of the feature's own dtype and shape, and text; "task" is the frame's task as text.
        Raises CalibrationError, which names the file and the fix, for what is missing, damaged or contradictory.
        """
        keys = list(self.keys if keys is None else keys)
        for key in keys:
            if key not in self.keys:
                raise CalibrationError(f"{self.folder}: has no feature {key!r} to read; it has {listed(self.keys)}")
        videos = [key for key in keys if self.features[key]["dtype"] == "video"]
        stored = [key for key in keys if key not in videos]
        found: dict[int, dict] = {}
        times: dict[int, float] = {}
        for index, row in self._rows(set(indices), [*stored, "timestamp", "task_index"]).items():
            check_fields(self._where(index), row, {"timestamp": float, "task_index": int})
            found[index] = {key: self._value(key, row[key], index) for key in stored}
            found[index]["task"] = self._task(row["task_index"], index)
            times[index] = float(row["timestamp"])
        for key in videos:
            for index, frame in self._frames(key, times).items():
                found[index][key] = frame
        return [{key: found[index][key] for key in (*keys, "task")} for index in indices]

    def frames_by_task(self) -> dict[str, list[Sequence[int]]]:
        """Task -> for each episode that has some of it, the numbers of its frames."""
        by_task: dict[str, list[Sequence[int]]] = {}
        for episode in self.episodes:
            if len(episode.tasks) == 1:
                by_task.setdefault(episode.tasks[0], []).append(range(episode.start, episode.start + episode.length))
                continue
            rows = self._episode_rows(episode, ["task_index"])
            for row in rows:
                check_fields(f"{episode.data}, episode {episode.index}", row, {"task_index": int})
            numbers = np.array([row["task_index"] for row in rows])
            for number in dict.fromkeys(numbers.tolist()):
                frames = (episode.start + np.flatnonzero(numbers == number)).tolist()
                by_task.setdefault(self._task(number, frames[0]), []).append(frames)
        return by_task

    def _rows(self, indices: set[int], names: list[str]) -> dict[int, dict]:
        """Frame -> its row of the parquet files."""
        by_file: dict[Path, list[int]] = {}
        for index in sorted(indices):
            by_file.setdefault(self.locate(index)[0].data, []).append(index)
        found: dict[int, dict] = {}
        for file, frames in by_file.items():
            table = Table(file)
            numbers = _row_numbers(table, [self.locate(index) for index in frames])
            rows = table.rows(numbers, names)
            found |= {index: rows[number] for index, number in zip(frames, numbers, strict=True)}
        return found

    def _episode_rows(self, episode: Episode, names: list[str]) -> list[dict]:
        frames = range(episode.start, episode.start + episode.length)
        rows = self._rows(set(frames), names)
        return [rows[index] for index in frames]

    def _frames(self, key: str, times: Mapping[int, float]) -> dict[int, np.ndarray]:
        """Frame -> its image of a video camera. times: of each frame in its episode, in seconds."""
        by_file: dict[Path, dict[int, float]] = {}
        for index, time in times.items():
            file, begin = self.locate(index)[0].videos[key]
            by_file.setdefault(file, {})[index] = begin + time
        images: dict[int, np.ndarray] = {}
        for file, wanted in by_file.items():
            frames = decode_frames(file, list(wanted.values()), self._begins[file], self.notes.append)
            images |= zip(wanted, frames, strict=True)
        return images

    def _value(self, key: str, value, index: int):
        """A feature of a frame as `read` returns it."""
        feature, where = self.features[key], f"{self._where(index)}: {key}"
        if value is None:
            raise CalibrationError(f"{where} is missing (null); leave the episode out or record it again")
        if feature["dtype"] == "image":
            return self._image(value, where)
        if feature["dtype"] == "string":
            return str(value)
        try:
            return np.asarray(value, feature["dtype"]).reshape(feature["shape"])
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            expected = f"{feature['dtype']} {list(feature['shape'])}"
            raise CalibrationError(f"{where} is no {expected}, which meta/info.json says ({error}); {_AGAIN}") from error

    def _image(self, value, where: str) -> np.ndarray:
        """An image of Hugging Face's form {"bytes", "path"}, decoded to uint8 RGB [H, W, 3]."""
        value = value if isinstance(value, dict) else {"bytes": value}
        content, path = value.get("bytes"), value.get("path")
        if not isinstance(content, bytes) and not (content is None and path and isinstance(path, str)):
            raise CalibrationError(f"{where} holds neither an image's bytes nor its path; {_AGAIN}")
        try:
            with Image.open(io.BytesIO(content) if content is not None else self.folder / path) as image:
                if image.mode != "RGB":
                    raise CalibrationError(f"{where} is an image of mode {image.mode}, the policies take RGB")
                return np.array(ImageOps.exif_transpose(image))  # turned, as Hugging Face's reader does
        except CalibrationError:
            raise
        except Exception as error:  # of any of Pillow's decoders
            what = "its image is damaged" if content is not None else f"its image file {self.folder / path} cannot be read"
            raise CalibrationError(f"{where}: {what} ({reason(error).partition(':')[0]}); {_AGAIN}") from error

    def _task(self, number: int, index: int) -> str:
        if number not in self.tasks:
            raise CalibrationError(f"{self._where(index)}: has task_index {number}, not listed in meta/tasks; {_AGAIN}")
        return self.tasks[number]

    def _where(self, index: int) -> str:
        episode, frame = self.locate(index)
        return f"{episode.data}, episode {episode.index}, frame {frame}"


def open_dataset(folder: str | Path) -> Dataset:
    """Opens a LeRobotDataset folder; of its data nothing is read yet.

    Raises CalibrationError, which names the file and the fix, if it is no such folder, of another version, or incomplete.
    """
    folder = Path(folder)
    info = read_json(folder / "meta" / "info.json")
    with reading(folder / "meta" / "info.json", CalibrationError, _AGAIN):
        version = _version(folder, info)
        features = _features(folder, info)
        read_tasks, read_episodes = (_tasks_v3, _episodes_v3) if version == "v3.0" else (_tasks_v2, _episodes_v2)
        videos = [name for name, feature in features.items() if feature["dtype"] == "video"]
        tasks = read_tasks(folder)
        episodes = read_episodes(folder, info, videos)
    expected = info.get("total_episodes")
    if not episodes or isinstance(expected, int) and len(episodes) < expected:
        raise CalibrationError(
            f"{folder / 'meta'}: lists {len(episodes)} episodes, of {expected} that info.json says; {_AGAIN}"
        )
    with reading(folder / "meta" / "info.json", CalibrationError, _AGAIN):
        return Dataset(folder, version, features, tasks, episodes)


def _version(folder: Path, info: dict) -> str:
    version = "v" + str(info.get("codebase_version")).removeprefix("v")
    if version in VERSIONS:
        return version
    where = f"{folder / 'meta' / 'info.json'}: is a LeRobotDataset of version {info.get('codebase_version')}"
    if version == "v2.0":
        script = "lerobot.datasets.v21.convert_dataset_v20_to_v21 of LeRobot 0.3.3"
    elif version.startswith("v1."):
        script = "lerobot.datasets.v2.convert_dataset_v1_to_v2, then v21.convert_dataset_v20_to_v21, of LeRobot 0.3.3"
    else:
        raise CalibrationError(f"{where}; this version of duq reads {' and '.join(VERSIONS)}")
    raise CalibrationError(f"{where}, and {' and '.join(VERSIONS)} are read; convert it with python -m {script}")


def _features(folder: Path, info: dict) -> dict[str, dict]:
    features = info.get("features")
    if not isinstance(features, dict) or not all(
        len(name) <= LONGEST_NAME and isinstance(feature, dict) and isinstance(feature.get("dtype"), str)
        for name, feature in features.items()
    ):
        raise CalibrationError(f"{folder / 'meta' / 'info.json'}: lacks features, name -> dtype and shape; {_AGAIN}")
    return features


def _is_input(name: str) -> bool:
    """Whether a feature may be an input of a policy: not an action, a reward or a number of the frame."""
    return name not in BOOKKEEPING and name.partition(".")[0] not in ("action", "actions", "next")


def _unreadable(feature: Mapping) -> str:
    """Why a feature cannot be read; empty if it can."""
    parts = [feature.get(key) or {} for key in ("video_info", "info")]
    if not all(isinstance(part, Mapping) for part in parts):
        return "described in a form that is not known"
    details = {**parts[0], **parts[1]}
    if details.get("is_depth_map") or details.get("video.is_depth_map"):
        return "a depth map"
    if feature["dtype"] in ("video", "image"):
        return ""
    if feature["dtype"] not in _NUMBERS | {"string"}:
        return f"of dtype {feature['dtype']}"
    shape = feature.get("shape")
    if not isinstance(shape, (list, tuple)):
        return "without a shape"
    if (
        not all(type(size) is int and 0 < size <= MOST_NUMBERS for size in shape[:9])
        or len(shape) > 8
        or math.prod(shape) > MOST_NUMBERS
    ):
        return f"of shape {brief(shape)}"
    return "several texts" if feature["dtype"] == "string" and list(feature["shape"]) not in ([], [1]) else ""


def _row_numbers(table: Table, places: list[tuple[Episode, int]]) -> list[int]:
    """Rows of a data file, of frames given as (episode, frame in it)."""
    episodes, frames = table.integers("episode_index"), table.integers("frame_index")
    found: dict[int, np.ndarray] = {}
    for episode in {episode.index: episode for episode, _ in places}.values():
        rows = np.flatnonzero(episodes == episode.index)
        if len(rows) != episode.length or not np.array_equal(frames[rows], np.arange(episode.length)):
            raise CalibrationError(
                f"{table.file}: does not hold the {episode.length} frames of episode {episode.index} that meta/episodes "
                f"says, but {len(rows)}; {_AGAIN}"
            )
        found[episode.index] = rows
    return [int(found[episode.index][frame]) for episode, frame in places]


# --- v3.0: parquet, many episodes a file -----------------------------------------------------------------------------


def _tasks_v3(folder: Path) -> dict[int, str]:
    """The text is the index of the data frame that was written: its column's name depends on the writer."""
    table = Table(folder / "meta" / "tasks.parquet")
    names = [name for name in ("task", "__index_level_0__") if name in table.columns] or table.strings()
    if len(names) != 1 and names[:1] != ["task"]:
        raise CalibrationError(f"{table.file}: has no column with the tasks' texts; it has {listed(table.columns)}")
    rows = [
        {"task_index": number, "task": text}
        for number, text in zip(table.column("task_index"), table.column(names[0]), strict=True)
    ]
    for row in rows:
        check_fields(table.file, row, {"task_index": int, "task": str})
    return {row["task_index"]: row["task"] for row in rows}


def _episodes_v3(folder: Path, info: dict, videos: list[str]) -> list[Episode]:
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise CalibrationError(f"{folder / 'meta' / 'episodes'}: holds no parquet files; {_AGAIN}")
    fields: dict[str, type] = dict.fromkeys(("episode_index", "length", "data/chunk_index", "data/file_index"), int)
    for key in videos:
        fields |= {f"videos/{key}/chunk_index": int, f"videos/{key}/file_index": int, f"videos/{key}/from_timestamp": float}
    rows: list[dict] = []
    for file in files:
        table = Table(file)
        columns = {name: table.column(name) for name in (*fields, "tasks")}
        here = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for row in here:
            check_fields(file, row, fields | {"tasks": list})
        rows += here

    def data(row: dict) -> Path:
        return _path(folder, info, "data_path", chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])

    def video(row: dict, key: str) -> tuple[Path, float]:
        chunk, file, begin = (row[f"videos/{key}/{part}"] for part in ("chunk_index", "file_index", "from_timestamp"))
        return _path(folder, info, "video_path", video_key=key, chunk_index=chunk, file_index=file), float(begin)

    return _numbered(rows, data, video, videos)


# --- v2.1: JSON lines, a file an episode -----------------------------------------------------------------------------


def _tasks_v2(folder: Path) -> dict[int, str]:
    file = folder / "meta" / "tasks.jsonl"
    lines = read_json_lines(file)
    for line in lines:
        check_fields(file, line, {"task_index": int, "task": str})
    return {line["task_index"]: line["task"] for line in lines}


def _episodes_v2(folder: Path, info: dict, videos: list[str]) -> list[Episode]:
    file = folder / "meta" / "episodes.jsonl"
    rows = read_json_lines(file)
    for row in rows:
        check_fields(file, row, {"episode_index": int, "length": int, "tasks": list})
    check_fields(folder / "meta" / "info.json", info, {"chunks_size": int})
    size = max(info["chunks_size"], 1)

    def path(row: dict, which: str, **names: str) -> Path:
        number = row["episode_index"]
        return _path(folder, info, which, episode_chunk=number // size, episode_index=number, **names)

    def video(row: dict, key: str) -> tuple[Path, float]:
        return path(row, "video_path", video_key=key), 0.0

    return _numbered(rows, lambda row: path(row, "data_path"), video, videos)


def _numbered(
    rows: list[dict],
    data: Callable[[dict], Path],
    video: Callable[[dict, str], tuple[Path, float]],
    videos: list[str],
) -> list[Episode]:
    """Episodes by index, each beginning where the one before ends; those without a frame are left out."""
    episodes, start = [], 0
    for row in sorted(rows, key=lambda row: row["episode_index"]):
        if row["length"] > 0:
            tasks = tuple(dict.fromkeys(map(str, row["tasks"])))
            files = {key: video(row, key) for key in videos}
            episodes.append(Episode(row["episode_index"], start, row["length"], tasks, data(row), files))
            start += row["length"]
    return episodes


def _path(folder: Path, info: dict, which: str, **names) -> Path:
    """A file of the dataset by the template that meta/info.json gives."""
    try:
        template = info[which]
        if not isinstance(template, str) or not _TEMPLATE.fullmatch(template):
            raise ValueError("expected a path with {names} and widths of at most 9 digits in it")
        path = template.format(**names)
        if path.startswith("/") or ".." in path.split("/") or len(path) > 4000:
            raise ValueError("it leads out of the folder")
        return folder / path
    except Exception as error:
        raise CalibrationError(
            f"{folder / 'meta' / 'info.json'}: {which} is {brief(info.get(which))}, which names no file ({reason(error)}); "
            f"{_AGAIN}"
        ) from error
