"""Writes small LeRobotDatasets, v3.0 and v2.1, without LeRobot. What a frame shows says which frame it is."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
HEIGHT, WIDTH = 48, 64
VIDEOS = ("observation.images.top", "observation.images.wrist")
STORED = "observation.images.still"  # a camera whose images are in the parquet files
H264 = {"codec": "libx264", "options": {"g": "12", "bf": "3", "preset": "veryfast"}}
AV1 = {"codec": "libsvtav1", "options": {"g": "2", "preset": "12", "svtav1-params": "tune=0"}}

FEATURES = {
    **{key: {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]} for key in VIDEOS},
    STORED: {"dtype": "image", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
    "observation.gripper": {"dtype": "float32", "shape": [1], "names": None},
    "observation.matrix": {"dtype": "float64", "shape": [2, 2], "names": None},
    "observation.touch": {"dtype": "bool", "shape": [1], "names": None},
    "observation.note": {"dtype": "string", "shape": [1], "names": None},
    "action": {"dtype": "float32", "shape": [2], "names": None},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
}


@dataclass
class Recorded:
    """An episode to write: its length, and its task (or one for each frame)."""

    length: int
    task: str | list[str] = "pick up the cup"

    def tasks(self) -> list[str]:
        return [self.task] * self.length if isinstance(self.task, str) else self.task


def picture(number: int, camera: int) -> np.ndarray:
    """A smooth image with the bits of ``number`` in its upper half and those of ``camera`` in a corner: they outlast lossy
    coding, see `shown_number`."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([x * 2, y * 3, x + y], -1).astype(np.uint8)
    for bit in range(8):
        image[:16, bit * 8 : bit * 8 + 8] = 220 if number >> bit & 1 else 30
    image[32:, :16] = 220 if camera else 30
    return image


def shown_number(image: np.ndarray) -> int:
    return sum(1 << bit for bit in range(8) if image[4:12, bit * 8 + 2 : bit * 8 + 6].mean() > 125)


def encode(file: Path, frames: list[np.ndarray], codec: str, options: dict, first: int = 0) -> None:
    """An mp4 with yuv420p; its first frame is at ``first`` / FPS seconds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number + first, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def decode_all(file: Path) -> list[np.ndarray]:
    """Every frame from the first to the last, without any seeking."""
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def expected(number: int) -> dict:
    """What of frame ``number`` is stored without loss."""
    return {
        "observation.state": np.array([number, number / 3, -number], np.float32),
        "observation.gripper": np.array([number / 7], np.float32),
        "observation.matrix": np.full((2, 2), number / 11),
        "observation.touch": np.array([number % 2 == 0]),
        "observation.note": f"note {number}",
        STORED: picture(number, 2),
    }


def _table(episodes: list[tuple[int, int, Recorded]], task_numbers: dict[str, int]) -> pa.Table:
    """The rows of the episodes (episode_index, number of the first frame, episode)."""
    columns: dict[str, list] = {key: [] for key in FEATURES if key not in VIDEOS}
    for index, start, episode in episodes:
        for frame, task in enumerate(episode.tasks()):
            number = start + frame
            row = expected(number) | {
                "action": [0.0, 1.0], "next.reward": 0.0, "frame_index": frame, "episode_index": index, "index": number,
                "task_index": task_numbers[task], "timestamp": np.float32(frame / FPS),
            }  # fmt: skip
            row[STORED] = {"bytes": png(row[STORED]), "path": f"frame-{frame:06d}.png"}
            for key, value in row.items():
                scalar = isinstance(value, np.ndarray) and value.shape == (1,)
                columns[key].append(value.item() if scalar else value.tolist() if isinstance(value, np.ndarray) else value)

    def kind(key: str) -> pa.DataType:
        feature = FEATURES[key]
        if feature["dtype"] == "image":
            return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        type_ = pa.type_for_alias(feature["dtype"])
        for _ in feature["shape"] if feature["shape"] != [1] else ():
            type_ = pa.list_(type_)
        return type_

    return pa.table({key: pa.array(values, kind(key)) for key, values in columns.items()})


def _placed(episodes: list[Recorded]) -> list[tuple[int, int, Recorded]]:
    starts = np.cumsum([0] + [episode.length for episode in episodes])
    return [(index, int(start), episode) for index, (start, episode) in enumerate(zip(starts, episodes, strict=False))]


def _task_numbers(episodes: list[Recorded]) -> dict[str, int]:
    return {task: number for number, task in enumerate(dict.fromkeys(task for each in episodes for task in each.tasks()))}


def _info(version: str, episodes: list[Recorded], data_path: str, video_path: str) -> dict:
    return {
        "codebase_version": version, "robot_type": "test", "fps": FPS, "features": FEATURES, "chunks_size": 2,
        "total_episodes": len(episodes), "total_frames": sum(each.length for each in episodes),
        "data_path": data_path, "video_path": video_path,
    }  # fmt: skip


def _write_json(file: Path, *objects: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(each) + "\n" for each in objects))


def _write_parquet(file: Path, table: pa.Table, rows_a_group: int = 4) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=rows_a_group)


def _pictures(placed: list[tuple[int, int, Recorded]], camera: int) -> list[np.ndarray]:
    return [picture(start + frame, camera) for _, start, episode in placed for frame in range(episode.length)]


def write_v3(
    folder: Path,
    episodes: list[Recorded],
    *,
    a_file: int = 2,
    task_column: str = "task",
    video: dict = H264,
    first: int = 0,
) -> Path:
    """``a_file``: episodes in a file of data and of videos; each file is in a chunk folder of its own.
    ``first``: frames by which every mp4 begins too late."""
    placed, numbers = _placed(episodes), _task_numbers(episodes)
    data_path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video_path = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    rows = []
    for file, begin in enumerate(range(0, len(placed), a_file)):
        group = placed[begin : begin + a_file]
        _write_parquet(folder / data_path.format(chunk_index=file, file_index=file), _table(group, numbers))
        for camera, key in enumerate(VIDEOS):
            path = folder / video_path.format(video_key=key, chunk_index=file, file_index=file)
            encode(path, _pictures(group, camera), **video, first=first)
        for index, start, episode in group:
            since = (start - group[0][1]) / FPS
            row = {"episode_index": index, "tasks": list(dict.fromkeys(episode.tasks())), "length": episode.length}
            row |= {"data/chunk_index": file, "data/file_index": file}
            row |= {"dataset_from_index": start, "dataset_to_index": start + episode.length}
            for key in VIDEOS:
                row |= {f"videos/{key}/chunk_index": file, f"videos/{key}/file_index": file}
                row |= {f"videos/{key}/from_timestamp": since, f"videos/{key}/to_timestamp": since + episode.length / FPS}
            rows.append(row)
    half = (len(rows) + 1) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        if part:
            _write_parquet(folder / f"meta/episodes/chunk-000/file-{number:03d}.parquet", pa.Table.from_pylist(part))
    tasks = {"task_index": list(numbers.values()), task_column: list(numbers)}
    _write_parquet(folder / "meta/tasks.parquet", pa.table(tasks))
    _write_json(folder / "meta/info.json", _info("v3.0", episodes, data_path, video_path))
    return folder


def write_v2(folder: Path, episodes: list[Recorded], *, video: dict = H264, first: int = 0) -> Path:
    placed, numbers = _placed(episodes), _task_numbers(episodes)
    data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video_path = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    for place in placed:
        names = {"episode_chunk": place[0] // 2, "episode_index": place[0]}
        _write_parquet(folder / data_path.format(**names), _table([place], numbers))
        for camera, key in enumerate(VIDEOS):
            encode(folder / video_path.format(**names, video_key=key), _pictures([place], camera), **video, first=first)
    lines = [{"episode_index": i, "tasks": list(dict.fromkeys(e.tasks())), "length": e.length} for i, _, e in placed]
    _write_json(folder / "meta/episodes.jsonl", *lines)
    _write_json(folder / "meta/tasks.jsonl", *({"task_index": number, "task": task} for task, number in numbers.items()))
    _write_json(folder / "meta/info.json", _info("v2.1", episodes, data_path, video_path))
    return folder
