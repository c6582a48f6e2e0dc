"""The parts of `make demo` that no other test runs."""

import numpy as np

from duq.runtime.observations import load_observations
from duq.tools.demo import main


def test_observations_are_photographs_and_go_through_the_loop(tiny_plans, tmp_path, command_line):
    for name, seed in (("first.npz", 0), ("again.npz", 0), ("other.npz", 1)):
        assert command_line(main, "observations", tmp_path / name, "--count", 2, "--seed", seed).code == 0
    first, again, other = (load_observations(tmp_path / name) for name in ("first.npz", "again.npz", "other.npz"))
    np.testing.assert_equal(first, again)
    assert not np.array_equal(first[0]["observation/image"], other[0]["observation/image"])
    for image in (first[0]["observation/image"], first[1]["observation/wrist_image"]):
        neighbors = np.abs(np.diff(image.astype(int), axis=1)).mean()
        assert image.std() > 20 and neighbors < 0.5 * image.std()  # noise has 1.13
    result = command_line(main, "run", tiny_plans("pi0", "none").plan, tmp_path / "first.npz")
    assert result.code == 0 and len(result.out.splitlines()) == 3
    assert result.out.count("[8, 7]") == 2 and result.out.count(" ms ") == 2
    result = command_line(main, "run", tmp_path / "first.npz", tmp_path / "first.npz")
    assert result.code == 2 and "not an engine plan" in result.err
