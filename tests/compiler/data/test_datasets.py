"""LeRobotDataset folders and the choice of observations: what is read, compared with plain decoding; what is refused."""

import io
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import tests.support.dataset_writer as writer
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.commands import compile_main, quantize_main
from duq.compiler.data import DATASET_COUNT, RobotMapping, load_calibration, open_dataset, robot_mapping
from duq.compiler.data.quality import concerns
from duq.compiler.data.sampling import evenly, positions, shares, spread
from duq.compiler.data.video import decode_frames
from duq.compiler.errors import CalibrationError
from duq.compiler.quant.calibrate import calibration_inputs
from duq.runtime.observations import save_observations
from duq.runtime.preprocess import Preprocessor
from duq.runtime.robots import Camera, Robot, StatePart, load_robot
from duq.tools import compare
from tests.support.dataset_writer import FPS, STORED, VIDEOS, Recorded, encode, shown_number, write_v2, write_v3

DOCS = Path(__file__).parents[3] / "docs"
CUP, DOOR, DRAWER = "pick up the cup", "öffne die Tür", "close the drawer"
EPISODES = [Recorded(7, CUP), Recorded(1, DOOR), Recorded(30, [CUP] * 10 + [DRAWER] * 20), Recorded(13, DRAWER)]
TOTAL = sum(episode.length for episode in EPISODES)
WRITERS = {"v3.0": write_v3, "v2.1": write_v2}
LIBERO = {
    "observation/image": ["image", VIDEOS[0]],
    "observation/wrist_image": [VIDEOS[1]],
    "observation/state": "observation.state",
    "images/cam_high": STORED,
    "prompt": ["task"],
}


@pytest.fixture(scope="session", params=WRITERS)
def folder(request, tmp_path_factory) -> Path:
    """Read only."""
    return WRITERS[request.param](tmp_path_factory.mktemp("datasets") / request.param, EPISODES)


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def all_tasks() -> list[str]:
    return [task for episode in EPISODES for task in episode.tasks()]


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_what_is_opened(folder):
    dataset = open_dataset(folder)
    assert dataset.codebase_version == folder.name and len(dataset) == TOTAL
    assert [episode.length for episode in dataset.episodes] == [7, 1, 30, 13]
    assert set(dataset.tasks.values()) == {CUP, DOOR, DRAWER}
    assert dataset.camera_keys == [*VIDEOS, STORED]
    assert "action" in dataset.features and not {"action", "next.reward", "index"} & set(dataset.keys)
    assert [dataset.locate(index)[1] for index in (0, 6, 7, 8, 37, 38)] == [0, 6, 0, 0, 29, 0]


def test_every_value_of_every_frame(folder):
    dataset = open_dataset(folder)
    observations = dataset.read(range(TOTAL))
    for number, (observation, task) in enumerate(zip(observations, all_tasks(), strict=False)):
        for key, value in writer.expected(number).items():
            np.testing.assert_equal(observation[key], value)
            assert getattr(observation[key], "dtype", None) == getattr(value, "dtype", None)
        assert observation["task"] == task and set(observation) == {*VIDEOS, *writer.expected(0), "task"}


def test_videos_are_those_of_a_plain_decoding_from_the_first_frame_to_the_last(folder):
    dataset = open_dataset(folder)
    observations = dataset.read(range(TOTAL))
    for camera, key in enumerate(VIDEOS):
        files = dict.fromkeys(episode.videos[key][0] for episode in dataset.episodes)
        plain = [image for file in files for image in writer.decode_all(file)]
        assert len(plain) == TOTAL and [shown_number(image) for image in plain] == list(range(TOTAL))
        for observation, image in zip(observations, plain, strict=True):
            assert observation[key].dtype == np.uint8 and np.array_equal(observation[key], image)
            assert (image[40:, :8].mean() > 125) == bool(camera)


@settings(max_examples=15, deadline=None)
@given(indices=st.lists(st.integers(0, TOTAL - 1), max_size=12))
def test_any_frames_in_any_order(folder, indices):
    found = open_dataset(folder).read(indices, [VIDEOS[1], "observation.state"])
    assert [shown_number(row[VIDEOS[1]]) for row in found] == indices
    assert [row["observation.state"][0] for row in found] == indices
    assert [row["task"] for row in found] == [all_tasks()[index] for index in indices]


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("version", WRITERS)
def test_videos_that_begin_late(tmp_path, version, first):
    """LeRobot's decoder gives the frame before; the state of the same row says which one is right."""
    folder = WRITERS[version](tmp_path / "late", EPISODES, first=first)
    found = load_calibration(folder, 20)
    for row in found.observations:
        assert shown_number(row[VIDEOS[0]]) == row["observation.state"][0]
    assert any(f"begins {first / FPS:.4f} s late" in line for line in found.warnings)


def test_a_late_video_whose_metadata_say_so(tmp_path):
    folder = write_v3(tmp_path / "late", EPISODES, first=3, a_file=9)
    file = folder / "meta/episodes/chunk-000/file-000.parquet"
    for file in (folder / "meta/episodes/chunk-000").iterdir():
        rows = pq.read_table(file).to_pylist()
        for row in rows:
            for key in VIDEOS:
                row[f"videos/{key}/from_timestamp"] += 3 / FPS
        pq.write_table(pa.Table.from_pylist(rows), file)
    dataset = open_dataset(folder)
    assert [shown_number(row[VIDEOS[0]]) for row in dataset.read(range(TOTAL))] == list(range(TOTAL)) and not dataset.notes


@pytest.mark.parametrize("column", ["task", "__index_level_0__", "index"])
@pytest.mark.parametrize("a_file", [1, 9])
def test_v3_in_other_files(tmp_path, column, a_file):
    folder = write_v3(tmp_path / "v3", EPISODES, task_column=column, a_file=a_file)
    found = open_dataset(folder).read([0, 7, 8, 20, TOTAL - 1])
    assert [row["task"] for row in found] == [CUP, DOOR, CUP, DRAWER, DRAWER]
    assert [shown_number(row[VIDEOS[0]]) for row in found] == [0, 7, 8, 20, TOTAL - 1]


CODECS = [
    ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-pyramid=2"}),
    ("libx264", {"g": "250", "bf": "0"}),
    ("libx265", {"g": "10", "x265-params": "log-level=none:open-gop=1"}),
    ("libsvtav1", {"g": "2", "preset": "12"}),
    ("libsvtav1", {"g": "30", "preset": "12"}),
    ("libvpx-vp9", {"g": "10"}),
    ("mpeg4", {"g": "8", "bf": "2"}),
]


@pytest.mark.parametrize("codec, options", CODECS)
def test_codecs(tmp_path, codec, options):
    encode(tmp_path / "video.mp4", [writer.picture(number, 0) for number in range(60)], codec, options)
    plain = writer.decode_all(tmp_path / "video.mp4")
    rng = np.random.default_rng(0)
    for numbers in (range(60), rng.permutation(60)[:7], [59], [0], [30, 31, 30], [11, 58]):
        found = decode_frames(tmp_path / "video.mp4", [number / FPS for number in numbers])
        assert all(np.array_equal(image, plain[number]) for image, number in zip(found, numbers, strict=True))


@pytest.mark.parametrize("time", [0.05, 0.1002, 5.9998, 6.0, 100.0, -0.1])
def test_times_without_a_frame(tmp_path, time):
    encode(tmp_path / "video.mp4", [writer.picture(number, 0) for number in range(60)], **writer.H264)
    decode_frames(tmp_path / "video.mp4", [0.1 + 0.00009, 5.9 - 0.00009])
    with pytest.raises(CalibrationError, match="video.mp4: has no frame at"):
        decode_frames(tmp_path / "video.mp4", [0.1, time])


def test_images_by_path(tmp_path, folder, copied):
    dataset = open_dataset(copied)
    file = dataset.episodes[0].data
    table = pq.read_table(file)
    (copied / "images").mkdir()
    cells = []
    for number, cell in enumerate(table.column(STORED).to_pylist()):
        (copied / f"images/{number}.png").write_bytes(cell["bytes"])
        cells.append({"bytes": None, "path": f"images/{number}.png"})
    position = table.column_names.index(STORED)
    pq.write_table(table.set_column(position, STORED, pa.array(cells, table.schema.field(STORED).type)), file)
    np.testing.assert_array_equal(dataset.read([3])[0][STORED], writer.picture(3, 2))
    (copied / "images/3.png").unlink()
    with pytest.raises(CalibrationError, match="episode 0, frame 3: .*still: its image file .*3.png cannot be read"):
        dataset.read([3])


def test_images_that_say_how_to_turn_them(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise by 90 degrees
    buffer = io.BytesIO()
    Image.fromarray(writer.picture(5, 0)).save(buffer, "png", exif=exif)
    found = open_dataset(folder)._image({"bytes": buffer.getvalue(), "path": None}, "here")
    np.testing.assert_array_equal(found, np.rot90(writer.picture(5, 0), -1))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version, message", [
    ("v2.0", "version v2.0, .*python -m lerobot.datasets.v21.convert_dataset_v20_to_v21"),
    ("v1.6", "convert_dataset_v1_to_v2, then .*convert_dataset_v20_to_v21"),
    ("v3.1", "version v3.1; this version of duq reads v3.0 and v2.1"),
    (None, "version None"),
])  # fmt: skip
def test_other_versions(copied, version, message):
    edit_json(copied / "meta/info.json", codebase_version=version)
    with pytest.raises(CalibrationError, match=message):
        open_dataset(copied)


def damaged(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        cut = content[: len(content) * 2 // 3]
        file.write_bytes({"empty": b"", "cut": cut, "pointer": pointer, "other": b"hello\n"}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "pointer", "other"])
@pytest.mark.parametrize("which", ["meta/info.json", "meta/tasks.*", "meta/episodes*", "data", "videos"])
def test_damaged_files(copied, which, how):
    found = sorted(copied.glob(which))[0]
    file = sorted(found.rglob("*.*"))[-1] if found.is_dir() else found
    if file.suffix == ".jsonl" and how == "cut":
        pytest.skip("a JSON lines file that is cut at the end of a line is told by its number of episodes")
    damaged(file, how)
    with pytest.raises(CalibrationError) as error:
        open_dataset(copied).read(range(TOTAL))
    message = str(error.value)
    assert "\n" not in message and (str(file) in message or "meta" in message) and len(message) < 600
    if how == "pointer":
        assert "git lfs pull" in message
    elif "meta/episodes" not in which:
        assert str(file) in message


def test_a_lost_episodes_file_is_missed(tmp_path):
    folder = write_v3(tmp_path / "v3", EPISODES)
    (folder / "meta/episodes/chunk-000/file-001.parquet").unlink()
    with pytest.raises(CalibrationError, match="lists 2 episodes, of 4 that info.json says"):
        open_dataset(folder)


def test_metadata_of_another_recording(copied, folder):
    dataset = open_dataset(copied)
    file = dataset.episodes[-1].data
    table = pq.read_table(file)
    pq.write_table(table.slice(0, len(table) - 1), file)
    with pytest.raises(CalibrationError, match="does not hold the 13 frames of episode 3 .*but 12"):
        dataset.read([TOTAL - 2])
    pq.write_table(table.set_column(table.column_names.index("task_index"), "task_index", pa.array([9] * len(table))), file)
    with pytest.raises(CalibrationError, match="episode 3, frame 12: has task_index 9, not listed in meta/tasks"):
        dataset.read([TOTAL - 1])
    pq.write_table(table.drop_columns(["observation.state"]), file)
    with pytest.raises(CalibrationError, match="has no column 'observation.state'; it has"):
        dataset.read([TOTAL - 1])
    with pytest.raises(CalibrationError, match="has no feature 'observation.nothing' to read; it has observation.im"):
        dataset.read([0], ["observation.nothing"])
    with pytest.raises(CalibrationError, match=f"has no frame {TOTAL}"):
        dataset.read([TOTAL])


@pytest.mark.parametrize("feature, message", [
    ({"dtype": "float32", "shape": [4]}, r"observation.state is no float32 \[4\], which meta/info.json says"),
    ({"dtype": "video", "shape": [4, 4, 3]}, "episodes|videos"),
])  # fmt: skip
def test_features_that_contradict_the_data(copied, feature, message):
    edit_json(copied / "meta/info.json", features=writer.FEATURES | {"observation.state": feature})
    with pytest.raises(CalibrationError, match=message):
        open_dataset(copied).read([0])


def test_what_cannot_be_read_is_left_out_by_name(copied):
    depth = writer.FEATURES[VIDEOS[1]] | {"info": {"video.is_depth_map": True}}
    language = {"dtype": "language", "shape": [1]}
    edit_json(copied / "meta/info.json", features=writer.FEATURES | {VIDEOS[1]: depth, "language_events": language})
    found = load_calibration(copied, 3)
    assert VIDEOS[1] not in found.observations[0]
    assert any(f"{VIDEOS[1]} is a depth map and is not read" in line for line in found.warnings)
    assert any("language_events is of dtype language" in line for line in found.warnings)
    with pytest.raises(CalibrationError, match=f"none of {VIDEOS[1]} for the robot's 'cam' .{VIDEOS[1]} is a depth map."):
        load_calibration(copied, 3, robot_mapping={"cam": VIDEOS[1]})


@pytest.mark.parametrize("module", ["pyarrow", "av"])
def test_a_missing_extra_is_named(folder, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CalibrationError, match=rf"needs {module}: pip install '\.\[data\]'"):
        open_dataset(folder).read([0])


ANYTHING = st.sampled_from([None, "x", [], -1, {}, 0, 1.5, True, float("nan")])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=ANYTHING)
def test_no_wrong_value_ends_in_a_traceback(small, data, value):
    files = [file for file in small.rglob("*.*") if file.suffix in (".json", ".jsonl", ".parquet")]
    file = data.draw(st.sampled_from(sorted(files)))
    content = file.read_bytes()
    try:
        if file.suffix == ".parquet":
            rows = pq.read_table(file).to_pylist()
            key = data.draw(st.sampled_from(list(rows[0])))
            try:
                pq.write_table(pa.Table.from_pylist([row | {key: value} for row in rows]), file)
            except pa.ArrowException:  # an empty struct
                return
        else:
            first, *rest = map(json.loads, content.splitlines())
            place = first
            while isinstance(place, dict) and place:
                inside, key = place, data.draw(st.sampled_from(list(place)))
                place = inside[key] if data.draw(st.booleans()) else None
            inside[key] = value
            file.write_text("\n".join(map(json.dumps, (first, *rest))))
        load_calibration(small, 4)
    except CalibrationError as error:
        assert "\n" not in str(error)
    finally:
        file.write_bytes(content)


@pytest.fixture(params=WRITERS)
def small(request, tmp_path) -> Path:
    return WRITERS[request.param](tmp_path / "small", [Recorded(3), Recorded(2, ["a", "b"])])


# --- sampling --------------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 50), max_size=12), count=st.integers(0, 300), seed=st.integers(0, 99))
def test_shares(sizes, count, seed):
    given_ = shares(sizes, count, np.random.default_rng(seed))
    assert sum(given_) == min(count, sum(sizes)) and all(0 <= got <= size for got, size in zip(given_, sizes, strict=True))
    short = [got for got, size in zip(given_, sizes, strict=True) if got < size]
    assert not short or max(short) - min(short) <= 1 and max(given_) <= max(short) + (min(short) == max(short))


@given(length=st.integers(1, 400), fraction=st.floats(0, 1), seed=st.integers(0, 99))
def test_positions(length, fraction, seed):
    count = round(length * fraction)
    found = positions(length, count, np.random.default_rng(seed))
    assert len(set(found)) == count and found == sorted(found) and all(0 <= each < length for each in found)
    assert all(index * length // count <= each < (index + 1) * length // count for index, each in enumerate(found))


@given(length=st.integers(1, 400), count=st.none() | st.integers(1, 500))
def test_evenly(length, count):
    found = evenly(length, count)
    assert found[0] == 0 and len(set(found)) == len(found) == min(length, count or length)
    assert len(found) < 2 or found[-1] == length - 1 and max(np.diff(found)) - min(np.diff(found)) <= 1


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, TOTAL + 5), seed=st.integers(0, 1000))
def test_spread(folder, count, seed):
    dataset = open_dataset(folder)
    picked = spread(dataset, count, seed)
    assert picked == spread(open_dataset(folder), count, seed) == sorted(set(picked))
    assert len(picked) == min(count, TOTAL) and 0 <= picked[0] and picked[-1] < TOTAL
    tasks = Counter(all_tasks()[index] for index in picked)
    assert len(tasks) == min(3, count) and tasks[DOOR] <= 1
    if count <= 3 + 2 * 10:  # neither of the others is used up
        assert abs(tasks[CUP] - tasks[DRAWER]) <= 1
    if tasks[DRAWER] >= 2:
        assert {dataset.locate(index)[0].index for index in picked if all_tasks()[index] == DRAWER} == {2, 3}


def test_other_seeds_pick_others(folder):
    dataset = open_dataset(folder)
    assert len({tuple(spread(dataset, 8, seed)) for seed in range(10)}) > 5


# --- the one entry ---------------------------------------------------------------------------------------------------


def test_a_dataset_as_it_is(folder):
    found = load_calibration(folder, 12, seed=3)
    assert len(found.observations) == len(found.labels) == len(found.shown) == 12
    assert found.source == f"{folder}: LeRobotDataset {folder.name}, 12 of {TOTAL} frames, seed 3"
    dataset = open_dataset(folder)
    for line, label, index, row in zip(found.shown, found.labels, spread(dataset, 12, 3), found.observations, strict=True):
        episode, frame = dataset.locate(index)
        assert line.split(maxsplit=4) == ["episode", str(episode.index), "frame", str(frame), row["task"]]
        assert label == f"episode {episode.index}, frame {frame}" and shown_number(row[VIDEOS[0]]) == index
    assert not found.warnings and len(load_calibration(folder).observations) == DATASET_COUNT


def test_a_robot_s_keys(folder):
    sources = LIBERO | {"images/cam_low": "none"}
    mapping = RobotMapping(sources, optional=["images/cam_low"], channels_first=["images/cam_high"])
    plain, found = load_calibration(folder, 6), load_calibration(folder, 6, robot_mapping=mapping)
    for row, named in zip(found.observations, plain.observations, strict=True):
        assert set(row) == {"observation/image", "observation/wrist_image", "observation/state", "images", "prompt"}
        assert np.array_equal(row["observation/image"], named[VIDEOS[0]]) and row["prompt"] == named["task"]
        np.testing.assert_equal(row["images"], {"cam_high": named[STORED].transpose(2, 0, 1)})
    assert found.warnings == [f"{folder}: has nothing for images/cam_low; it is left out of the observations"]
    with pytest.raises(CalibrationError, match="none of a, b for the robot's 'state'; it has observation.i.*task: say"):
        load_calibration(folder, 6, robot_mapping={"state": ["a", "b"]})


def test_only_what_the_robot_needs_is_read(copied):
    shutil.rmtree(copied / "videos")
    found = load_calibration(copied, 4, robot_mapping={"state": "observation.state", "prompt": "task"})
    assert set(found.observations[0]) == {"state", "prompt"}


def numbered(count: int) -> list[dict]:
    image = writer.picture(1, 0)
    return [{"image": np.roll(image, i, 1), "state": np.full(3, i, np.float32), "prompt": "go"} for i in range(count)]


def test_npz_files_are_picked_as_before(tmp_path):
    save_observations(tmp_path / "a.npz", numbered(40)[:10])
    for index, row in enumerate(numbered(40)[10:]):
        save_observations(tmp_path / f"b{index:02}.npz", [row])
    for count in (1, 2, 7, 32, 39, 40):
        found = load_calibration(tmp_path, count)
        expected = np.linspace(0, 39, count).round().astype(int).tolist()
        assert [row["state"][0] for row in found.observations] == expected
        assert found.labels == [f"observation {index}" for index in expected]
    everything = load_calibration(tmp_path)
    assert len(everything.observations) == 40 and not everything.shown and not everything.warnings
    (tmp_path / "b05.npz").write_bytes(b"damaged")
    with pytest.raises(CalibrationError, match="calibration data .*b05.npz: is not an .npz file"):
        load_calibration(tmp_path, 2)


@pytest.mark.parametrize("name, made, message", [
    ("lerobot/pusht", None, "no such file .*hf download --repo-type dataset lerobot/pusht --local-dir lerobot/pusht"),
    ("hf:/lerobot/pusht", None, "hf download --repo-type dataset lerobot/pusht"),
    ("a/b/c", None, "a/b/c: no such file or folder$"),
    ("none.npz", None, "none.npz: cannot be read .No such file"),
    ("rlds", "rlds/1.0.0/features.json", "TFDS / RLDS .*convert_libero_data_to_lerobot.py"),
    ("hdf5", "hdf5/episode_0.hdf5", "folder of HDF5 episodes; .*convert_aloha_data_to_lerobot.py"),
    ("e.hdf5", "e.hdf5", "e.hdf5: is HDF5 episodes"),
    ("old", "old/meta_data/info.json", "version v1.x"),
    ("home", "home/user/pusht/meta/info.json", "holds some; give one of them, such as home/user/pusht"),
    ("empty", "empty/notes.txt", "holds no .npz file of observations, and is no LeRobotDataset"),
    ("text.txt", "text.txt", "is not an .npz file"),
])  # fmt: skip
def test_other_sources(tmp_path, monkeypatch, name, made, message):
    monkeypatch.chdir(tmp_path)
    if made:
        Path(made).parent.mkdir(parents=True, exist_ok=True)
        Path(made).write_text("{}")
    with pytest.raises(CalibrationError, match=message) as error:
        load_calibration(name, 4)
    assert "\n" not in str(error.value)


# --- warnings --------------------------------------------------------------------------------------------------------


def scene(seed: int, **changes) -> dict:
    rng = np.random.default_rng(seed)
    image = np.roll(writer.picture(seed, 0), seed, 0)
    return {"images": {"top": image}, "state": rng.standard_normal(4).astype(np.float32), "prompt": "go"} | changes


def seeing(seed: int, image: np.ndarray) -> dict:
    return scene(seed, images={"top": image})


SAME = writer.picture(0, 0)
NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.mark.parametrize("observations, count, expected", [
    ([scene(i) for i in range(4)], 4, []),
    ([scene(i) for i in range(4)], None, []),
    ([scene(i) for i in range(4)], 32, ["there are 4 observations, fewer than the 32 asked for"]),
    ([scene(0)], 32, ["there is only one observation"]),
    ([scene(i, state=np.ones(4, np.float32)) for i in range(4)], 4, ["all 4 observations have the same state"]),
    ([scene(i, prompt=" ") for i in range(4)], 4, ["all prompts are empty"]),
    ([scene(i, prompt=" " * (i % 2)) for i in range(3)] + [scene(3)], 4, []),
    ([seeing(i, np.full((48, 64, 3), i, np.uint8)) for i in range(4)], 4, ["images/top: 4 of 4 images are of a single"]),
    ([seeing(0, NOISE)] + [scene(i) for i in range(1, 4)], 4, ["images/top: 1 of 4 images look like noise"]),
    ([seeing(i, NOISE.transpose(2, 0, 1) + i) for i in range(2)], 2, ["images/top: 2 of 2 images look like noise"]),
    ([seeing(i, SAME.transpose(2, 0, 1)) for i in range(2)], 2, ["images/top: all 2 images are the same"]),
])  # fmt: skip
def test_warnings(observations, count, expected):
    found = concerns(observations, count)
    assert len(found) == len(expected), found
    for line, begin in zip(found, expected, strict=True):
        assert line.startswith(begin)


# --- the command lines -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    sizes = dict(depth=1, vision_depth=1, action_horizon=4)
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "libero", robot="libero", **sizes)


@pytest.mark.parametrize("main", [quantize_main, compile_main])
def test_a_dataset_whose_names_the_robot_does_not_know(command_line, tmp_path, checkpoint, main):
    folder = write_v3(tmp_path / "v3", EPISODES)
    arguments = ["--calibration", folder, "--calibration-seed", 5, "--robot", "libero", "--out", tmp_path / "out"]
    ran = command_line(main, checkpoint, *arguments)
    assert ran.code == 2 and "has none of image, observation.images.image" in ran.err
    assert "say under [dataset] in the robot's TOML file" in ran.err and not (tmp_path / "out").exists()


def test_a_robot_s_policy_is_calibrated_on_a_dataset(tmp_path, checkpoint):
    features = writer.FEATURES | {"observation.state": {"dtype": "float32", "shape": [8]}}
    folder = write_v3(tmp_path / "v3", EPISODES[:2])
    edit_json(folder / "meta/info.json", features=features)
    for file in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        states = [[*state, 0, 0, 0, 0, 0] for state in table.column("observation.state").to_pylist()]
        column, states = table.column_names.index("observation.state"), pa.array(states, pa.list_(pa.float32()))
        pq.write_table(table.set_column(column, "observation.state", states), file)
    names = {key: name for key, name in LIBERO.items() if key != "images/cam_high"}
    lines: list[str] = []
    source = load_checkpoint(checkpoint)
    robot, tokenizer = replace(load_robot("libero"), dataset=names), source.tokenizer.read_bytes()
    preprocessor = Preprocessor(source.config, robot=robot, norm_stats=source.norm_stats, tokenizer=tokenizer)
    found = calibration_inputs(folder, preprocessor, 6, report=lines.append)
    assert len(found) == 6 and all(each.image_mask.tolist() == [True, True, False] for each in found)
    assert lines[0].startswith(str(folder)) and len(lines) == 7
    tokens = {tuple(each.tokens[each.token_mask]) for each in found}
    assert len(tokens) == 2  # of the tasks


def test_a_dataset_is_read_under_a_robot_s_own_names_where_its_file_says_nothing(folder):
    keys = VIDEOS[1], "observation.state"
    robot = Robot(
        "mine", (Camera((keys[0],), required=True), Camera(("absent",))), (StatePart((keys[1],), ("a", "b", "c")),), ("x",)
    )
    found = load_calibration(folder, 4, robot_mapping=robot_mapping(robot))
    assert all(set(each) == {*keys, "prompt"} for each in found.observations)
    assert any("nothing for absent" in line for line in found.warnings)


def test_compare_takes_a_dataset(command_line, tiny_plans, folder):
    compiled = tiny_plans("pi0", "none")
    ran = command_line(compare.main, compiled.checkpoint, compiled.plan, "--observations", folder, "--count", 3)
    assert ran.code == 2 and "has none of image, observation.images.image" in ran.err.splitlines()[-1]


def test_warnings_are_printed(command_line, tmp_path, checkpoint):
    image = np.zeros((8, 8, 3), np.uint8)
    observation = {"observation/image": image, "observation/state": np.zeros(8, np.float32), "prompt": "go"}
    save_observations(tmp_path / "o.npz", [observation])
    arguments = ["--calibration", tmp_path / "o.npz", "--robot", "libero", "--scope", "expert.layers.0.mlp"]
    ran = command_line(quantize_main, checkpoint, *arguments, "--out", tmp_path / "packs")
    assert ran.code == 0, ran.err
    assert "warning: there is only one observation" in ran.err and "warning: observation/image: 1 of 1 images" in ran.err


def test_the_example_of_the_docs_runs(tmp_path, folder, monkeypatch, capsys):
    example = re.search(r"```python\n(.*?)```", (DOCS / "calibration.md").read_text(), re.DOTALL)[1]
    (tmp_path / "dataset").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "example", "exec"), {})
    assert capsys.readouterr().out.count("episode ") == 8
