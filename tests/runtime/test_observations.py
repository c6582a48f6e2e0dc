"""Observation files: round trips of every form, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from duq.runtime.errors import ObservationError
from duq.runtime.observations import load_observations, save_observations


def bare(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "image": {"base_0_rgb": rng.integers(0, 256, (8, 6, 3), np.uint8)},
        "image_mask": {"base_0_rgb": True},
        "state": rng.standard_normal(4).astype(np.float32),
        "prompt": "pick up the cup" + "!" * seed,
    }


def libero(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "observation/image": rng.integers(0, 256, (8, 6, 3), np.uint8),
        "observation/state": rng.standard_normal(8),
        "prompt": "öffne die Tür",
    }


def aloha(seed: int) -> dict:
    return {"images": {"cam_high": np.full((3, 4, 4), seed, np.uint8)}, "state": np.full(14, seed, np.float64)}


@pytest.mark.parametrize("form", [bare, libero, aloha])
def test_round_trip(tmp_path, form):
    observations = [form(seed) for seed in range(3)]
    save_observations(tmp_path / "set.npz", observations)
    np.testing.assert_equal(load_observations(tmp_path / "set.npz"), observations)
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


def test_a_directory_is_read_in_order_and_may_mix_forms(tmp_path):
    save_observations(tmp_path / "b.npz", [libero(0), libero(1)])
    save_observations(tmp_path / "a.npz", [bare(0)])
    (tmp_path / "notes.txt").write_text("not read")
    np.testing.assert_equal(load_observations(tmp_path), [bare(0), libero(0), libero(1)])


def test_types_survive(tmp_path):
    save_observations(tmp_path / "set.npz", [bare(0)])
    observation = load_observations(tmp_path / "set.npz")[0]
    assert type(observation["prompt"]) is str
    assert observation["image_mask"]["base_0_rgb"].dtype == bool
    assert observation["state"].dtype == np.float32 and observation["image"]["base_0_rgb"].dtype == np.uint8


@given(
    array=hnp.arrays(st.sampled_from([np.uint8, np.float32, bool]), hnp.array_shapes(min_dims=1, max_side=4)),
    keys=st.sets(st.sampled_from(["state", "observation/image", "images/b", "image/a", "a/b"]), min_size=1),
)
def test_any_arrays_round_trip(tmp_path_factory, array, keys):
    path = tmp_path_factory.mktemp("any") / "set.npz"
    np.savez(path, **{key: array for key in keys})
    loaded = load_observations(path)
    save_observations(path, loaded)
    np.testing.assert_equal(load_observations(path), loaded)
    assert len(loaded) == len(array)


@pytest.mark.parametrize("arrays, message", [
    ({"state": np.zeros((2, 3)), "prompt": np.array(["a"])}, "prompt holds 1 observations and state 2"),
    ({"state": np.zeros((0, 3))}, "state holds 0 observations"),
    ({"state": np.float32(1)}, "state holds 0 observations"),
    ({}, "holds no arrays"),
    ({"prompt": np.array(["a", None])}, "plain arrays"),
])  # fmt: skip
def test_files_of_the_wrong_shape(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ObservationError, match=message):
        load_observations(tmp_path / "set.npz")


def test_unreadable_files(tmp_path):
    with pytest.raises(ObservationError, match="cannot be read .No such file"):
        load_observations(tmp_path / "none.npz")
    with pytest.raises(ObservationError, match="holds no .npz file"):
        load_observations(tmp_path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ObservationError, match="not an .npz file"):
        load_observations(tmp_path / "array.npy")
    save_observations(tmp_path / "whole.npz", [libero(0)])
    whole = (tmp_path / "whole.npz").read_bytes()
    for damaged in (b"", b"hello", whole[: len(whole) // 2], whole[:100] + bytes(8) + whole[108:]):
        (tmp_path / "bad.npz").write_bytes(damaged)
        with pytest.raises(ObservationError, match="bad.npz"):
            load_observations(tmp_path / "bad.npz")


@pytest.mark.parametrize("second, message", [
    ({"state": np.zeros(15)}, "images/cam_high is not in every observation"),
    (aloha(1) | {"state": np.zeros(15)}, "state differs in shape"),
    (aloha(1) | {"state": np.zeros(14, np.float32)}, "state differs in shape or dtype"),
])  # fmt: skip
def test_unequal_observations_are_not_saved(tmp_path, second, message):
    with pytest.raises(ObservationError, match=message):
        save_observations(tmp_path / "set.npz", [aloha(0), second])
    with pytest.raises(ObservationError, match="no observations"):
        save_observations(tmp_path / "set.npz", [])
    with pytest.raises(ObservationError, match="set.npz: state: is a NoneType, expected numbers"):
        save_observations(tmp_path / "set.npz", [{"state": None}])
    assert not list(tmp_path.iterdir())
