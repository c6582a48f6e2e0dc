"""examples/libero, all that needs no simulator: starts, grasps, journals, evaluation and reports."""

import itertools
import json
import math
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.stats import binomtest

from duq.examples.libero import collect, demonstrations, evaluate, pack_assets, report, rollout
from duq.examples.libero.demonstrations import Demonstration
from duq.examples.libero.expert import attitude, choose_grasp, clearance, highest, in_hand
from duq.examples.libero.journal import Journal
from duq.examples.libero.rollout import Conditions, Episode, Stress
from duq.examples.libero.scene import axis_angle
from duq.examples.libero.starts import APART, BASE, JITTER, PUSHING, REACH, TRAINING_SEED, Start, permute
from duq.plugins.errors import DuqError
from tests.support.libero import REPLIES, FakeScene

SLOTS = np.array([[-0.12, -0.24], [0.05, -0.1], [-0.15, 0.06], [0.1, -0.2], [0.14, 0.03], [-0.2, -0.08]])  # the suite's


# --- starts ----------------------------------------------------------------------------------------------------------


def test_a_start_is_determined_by_its_seed_and_task():
    def draws(start, purpose=PUSHING):
        return start.generator(purpose).random(4)

    start = Start(3, 17)
    np.testing.assert_array_equal(draws(start), draws(Start(3, 17)))
    np.testing.assert_array_equal(draws(start), draws(Start(3, 17, "official")))  # places have no part in it
    for other in (Start(4, 17), Start(3, 18)):
        assert not np.array_equal(draws(start), draws(other))
    assert not np.array_equal(draws(start), draws(start, PUSHING + 1))
    assert [Start(0, seed).recorded(50) for seed in (0, 49, 50, 1_000_003)] == [0, 49, 0, 3]


@pytest.mark.parametrize("seed", range(20))
def test_objects_change_places_and_stay_apart(seed):
    found = permute(SLOTS, np.random.default_rng(seed))
    off = np.abs(found[:, None] - SLOTS).max(axis=-1)
    assert sorted(off.argmin(axis=1)) == list(range(6)) and off.min(axis=1).max() <= JITTER
    apart = np.linalg.norm(found[:, None] - found, axis=-1) + np.eye(6)
    assert apart.min() >= APART and np.linalg.norm(found - BASE, axis=1).max() <= REACH


def test_every_object_comes_to_every_place():
    random = np.random.default_rng(0)
    nearest = [np.linalg.norm(permute(SLOTS, random)[:, None] - SLOTS, axis=-1).argmin(axis=1) for _ in range(200)]
    for each in np.array(nearest).T:
        assert set(each) == set(range(6))


@pytest.mark.parametrize("slots", [np.zeros((2, 2)), np.array([[0.5, 0.0]])])
def test_places_that_cannot_be_had_are_refused(slots):
    with pytest.raises(ValueError, match="no places within 0.03 m"):
        permute(slots, np.random.default_rng(0))


@pytest.mark.parametrize("seed", range(5))
def test_pushes_are_short_and_leave_the_gripper_alone(seed):
    added = collect.pushes(np.random.default_rng(seed), 300)
    pushed = added.any(axis=1)
    edges = np.flatnonzero(np.diff(pushed.astype(int)))
    assert 0.02 < pushed.mean() < 0.2 and (added[:, 6] == 0).all() and not pushed[:5].any()
    assert np.diff(edges)[1::2].min() >= 20  # pauses
    np.testing.assert_array_equal(added, collect.pushes(np.random.default_rng(seed), 300))


# --- the expert's geometry -------------------------------------------------------------------------------------------


def box(center, size, yaw=0.0, grid=8):
    """Points of a box that stands on the ground."""
    line = np.linspace(-0.5, 0.5, grid)
    points = np.stack(np.meshgrid(line, line, line), axis=-1).reshape(-1, 3) * size
    turned = Rotation.from_euler("z", yaw).apply(points)
    return turned + (*center, size[2] / 2)


@pytest.mark.parametrize("yaw", [-1.2, 0.0, 0.4, math.pi / 2])
def test_the_hands_attitude(yaw):
    rotation = attitude(yaw)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1) and rotation[2, 2] == -1  # down
    np.testing.assert_allclose(in_hand(rotation[None, :, 0] + 0.5, np.full(3, 0.5), yaw), [[1, 0, 0]], atol=1e-12)


def test_in_hand_takes_many_points():
    points = np.random.default_rng(0).normal(size=(7, 3))
    found = in_hand(points, np.array([0.1, 0.2, 0.3]), 0.3)
    np.testing.assert_allclose(found, (points - (0.1, 0.2, 0.3)) @ np.c_[attitude(0.3)[:, 0], _across(0.3), (0, 0, 1)])


def _across(yaw):
    return np.array([math.cos(yaw), math.sin(yaw), 0])


@pytest.mark.parametrize("yaw", [0.0, 0.5, -0.9, 1.4])
def test_a_long_box_is_gripped_across(yaw):
    """A box of 15 x 4 cm fits between the fingers one way only."""
    target = box((0.1, 0.0), (0.15, 0.04, 0.03), yaw)
    body = target.mean(axis=0)
    grasp = choose_grasp(body, target, np.empty((0, 3)))
    assert abs(math.remainder(grasp.yaw - yaw, math.pi)) < 0.2
    np.testing.assert_allclose(body[:2] + grasp.offset[:2], (0.1, 0.0), atol=0.005)
    assert 0.012 <= grasp.below <= 0.03


def test_the_hand_turns_away_from_a_tall_neighbor():
    target, neighbor = box((0, 0), (0.04, 0.04, 0.06)), box((0.0, 0.095), (0.05, 0.05, 0.15))
    alone = choose_grasp(target.mean(axis=0), target, np.empty((0, 3)))
    beside = choose_grasp(target.mean(axis=0), target, neighbor)
    place = target.mean(axis=0) + beside.offset
    assert alone.yaw == 0 and clearance(neighbor, place, 0.0) < 0 < clearance(neighbor, place, beside.yaw)
    assert beside.clearance > 0 and abs(beside.yaw) > 0.5


def test_clearance_is_a_distance_of_the_hands_outline():
    place = np.array([0.2, 0.1, 0.05])
    above = lambda x, y: np.array([[0.2 + x, 0.1 + y, 0.2]])  # noqa: E731
    assert clearance(above(0, 0.136), place, 0.0) == pytest.approx(0.03)  # fingers close along y
    assert clearance(above(0.034 + 0.03, 0.106 + 0.04), place, 0.0) == pytest.approx(0.05)
    assert clearance(above(0, 0.1), place, 0.0) == pytest.approx(-0.006)
    assert clearance(above(0.136, 0), place, math.pi / 2) == pytest.approx(0.03)
    assert clearance(np.array([[0.2, 0.1, 0.0]]), place, 0.0) == np.inf  # below the fingertips


def test_tall_things_are_gripped_near_the_top_and_flat_ones_above_the_ground():
    tall, flat = box((0, 0), (0.05, 0.05, 0.2)), box((0, 0), (0.08, 0.04, 0.018))
    for target, low, high in ((tall, 0.16, 0.2), (flat, 0.011, 0.013)):
        grasp = choose_grasp(target.mean(axis=0), target, np.empty((0, 3)))
        assert low <= grasp.below <= high


def test_the_arm_reaches_less_high_further_away():
    heights = [highest(distance) for distance in (0.4, 0.6, 0.7, 0.75, 0.9)]
    assert heights == sorted(heights, reverse=True) and heights[0] > 0.6 and heights[-1] == pytest.approx(0.123)


@pytest.mark.parametrize("angle", [0.3, math.pi, 4.0])
def test_axis_angle_is_openpis(angle):
    axis = np.array([2, -1, 2]) / 3
    quaternion = np.append(math.cos(angle / 2), math.sin(angle / 2) * axis)
    np.testing.assert_allclose(axis_angle(quaternion), axis * angle, atol=1e-9)
    np.testing.assert_array_equal(axis_angle(np.array([1.0, 0, 0, 0])), 0)
    np.testing.assert_array_equal(axis_angle(np.array([1.0 + 1e-9, 0, 0, 0])), 0)


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_journal_goes_on_after_a_cut(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.read() == []
    journal.add({"a": 1})
    journal.add({"a": "ü"})
    with open(journal.file, "ab") as stream:
        stream.write('{"a": "ü'.encode()[:-1])  # the power failed
    assert journal.read() == [{"a": 1}, {"a": "ü"}]
    journal.add({"a": 3})
    assert [line["a"] for line in journal.read()] == [1, "ü", 3]


@pytest.mark.parametrize("content", [b"no json\n", b'{"a": 1}\n[2]\n', b"\xff\xfe\n"])
def test_another_file_is_no_journal(tmp_path, content):
    file = tmp_path / "j.jsonl"
    file.write_bytes(content)
    with pytest.raises(DuqError, match=r"j\.jsonl: line \d is no JSON object"):
        Journal(file).read()
    assert file.read_bytes() == content


def test_demonstrations_are_found_and_checked(tmp_path):
    with pytest.raises(DuqError, match="holds no demonstrations"):
        demonstrations.listed(tmp_path)
    made = Demonstration(np.random.default_rng(0).random((5, 4)), np.ones((5, 7), np.float32), np.arange(5) == 2)
    for task, seed in ((2, 1_000_001), (10, 1_000_000), (2, 999)):
        demonstrations.save(demonstrations.path_of(tmp_path, task, seed), made)
    assert demonstrations.listed(tmp_path) == [(2, 999), (2, 1_000_001), (10, 1_000_000)]
    file = demonstrations.path_of(tmp_path, 2, 999)
    found = demonstrations.load(file)
    for name, value in vars(made).items():
        np.testing.assert_array_equal(getattr(found, name), value)
    pictures, names = np.ones((5, 2, 14, 14, 3), np.uint8), np.array(["milk"])
    places = np.zeros((5, 3)), np.zeros((5, 1, 3))
    seen = demonstrations.Seen(np.arange(5), pictures, np.zeros((5, 8)), *places, names, "pick it up")
    demonstrations.save_seen(file, seen)
    assert demonstrations.load_seen(file, 14).prompt == "pick it up" and len(demonstrations.listed(tmp_path)) == 3
    assert not list(tmp_path.rglob(".*"))
    with pytest.raises(DuqError, match="holds no pictures"):
        demonstrations.load_seen(file, 28)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DuqError, match="is no demonstration"):
        demonstrations.load(file)


def test_moments_before_a_push_are_not_rendered():
    pushed = np.arange(20) == 12
    steps = demonstrations.learned_from(pushed, 0, 1)
    assert steps.tolist() == [*range(8), *range(13, 16)]  # five undisturbed actions follow, before the end
    thirds = [demonstrations.learned_from(pushed, seed, 3).tolist() for seed in (0, 1, 5)]
    assert thirds[0] == [0, 3, 6, 14] and sorted(step for some in thirds for step in some) == steps.tolist()
    assert len(demonstrations.learned_from(pushed[:3], 0, 1)) == 0


def test_processes_get_jobs_of_one_task_in_blocks():
    jobs = [(task, seed) for task in range(3) for seed in range(60)]
    blocks = demonstrations.blocks(jobs, 2)
    assert sorted(job for block in blocks for job in block) == jobs
    assert all(len({task for task, _ in block}) == 1 and len(block) <= demonstrations.BLOCK for block in blocks)
    assert [block[0] for block in blocks[:4]] == [(0, 0), (1, 0), (2, 0), (0, 25)]
    assert demonstrations.blocks([(0, 0)], 16) == [[(0, 0)]] and demonstrations.blocks([], 16) == []


def test_failed_starts_are_replaced_by_the_next():
    first = [(1, TRAINING_SEED + i) for i in range(3)]
    assert collect.missing({}, [1], 3) == first
    tried = dict.fromkeys(first[1:], 90) | {first[0]: None, (2, TRAINING_SEED): 80}
    assert collect.missing(tried, [1, 2], 3) == [(1, TRAINING_SEED + 3), (2, TRAINING_SEED + 1), (2, TRAINING_SEED + 2)]
    assert collect.missing(tried | {(1, TRAINING_SEED + 3): 70}, [1], 3) == []
    hopeless = {(1, TRAINING_SEED + i): None for i in range(collect.GIVE_UP * 3)}
    assert collect.missing(hopeless, [1], 3) == []


def test_a_stopped_collection_finds_the_same_demonstrations():
    """Whatever order results come in and wherever it stops: the first successes of the task."""
    succeeds = lambda seed: seed % 3 != 0  # noqa: E731

    def collected(stops):
        tried, random = {}, np.random.default_rng(stops)
        while todo := collect.missing(tried, [0], 7):
            for job in random.permutation(todo)[: random.integers(1, len(todo) + 1)] if stops else todo:
                tried[tuple(map(int, job))] = 50 if succeeds(job[1]) else None
        return sorted(seed for (_, seed), steps in tried.items() if steps)

    assert all(collected(stops) == collected(0) for stops in range(1, 5)) and len(collected(0)) == 7


# --- episodes, in a scene that is none ---------------------------------------------------------------------------------


CONDITIONS = Conditions("libero_object", execute=5, limit=12)


def test_the_expert_is_recorded_without_its_pushes():
    scene = FakeScene(done_at=40)
    found = collect.demonstrate(scene, Start(0, 3), FakeScene.Expert)
    assert len(found.states) == len(found.actions) == len(found.pushed) and found.pushed.any()
    np.testing.assert_array_equal(found.actions, np.full_like(found.actions, 0.25))
    drifted = len(scene.actions) - len(found.actions)
    added = np.array(scene.actions[drifted:]) - 0.25
    np.testing.assert_allclose(added[:, 6], 0, atol=1e-6)
    assert np.abs(added[found.pushed]).mean() > 3 * np.abs(added[~found.pushed]).mean() > 0
    calm = FakeScene(done_at=40)
    found = collect.demonstrate(calm, Start(0, 3), FakeScene.Expert, strength=0.0)
    np.testing.assert_array_equal(calm.actions, found.actions)  # to be replayed
    assert not found.pushed.any() and len(found.actions) == 40
    assert collect.demonstrate(FakeScene(done_at=10_000), Start(0, 3), FakeScene.Expert) is None


def test_an_episode_carries_out_so_many_actions_until_its_limit():
    episode = Episode(FakeScene(done_at=100), Start(0, 0), CONDITIONS)
    assert [episode.carry_out(np.zeros((10, 7))) for _ in range(4)] == [5, 5, 2, 0]
    assert episode.done and not episode.success and episode.steps == 12


def test_an_episode_ends_with_success():
    scene = FakeScene(done_at=7)
    episode = Episode(scene, Start(0, 0), CONDITIONS)
    assert [episode.carry_out(np.zeros((10, 7))) for _ in range(2)] == [5, 2]
    assert episode.success and episode.done and len(scene.actions) == 7


def test_stress_is_the_same_for_everybody_and_none_by_default():
    def run(stress, seed=5):
        scene = FakeScene(done_at=1000)
        episode = Episode(scene, Start(0, seed), replace(CONDITIONS, limit=60, stress=stress))
        images = [episode.observation()["observation/image"]]
        while not episode.done:
            episode.carry_out(np.zeros((5, 7)))
            images.append(episode.observation()["observation/image"])
        return np.array(images), scene

    plain, scene = run(Stress())
    assert (plain == 128).all() and scene.moved is None and scene.pushes == []
    noisy, _ = run(Stress(noise=10.0))
    np.testing.assert_array_equal(noisy, run(Stress(noise=10.0))[0])
    assert 8 < noisy.std() < 12 and not np.array_equal(noisy[0], noisy[1])
    _, moved = run(Stress(camera=0.05))
    assert np.linalg.norm(moved.moved) == pytest.approx(0.05)
    _, pushed = run(Stress(push=0.3))
    (step, name, velocity), *others = pushed.pushes
    assert not others and rollout.PUSH_AFTER <= step < rollout.PUSH_BEFORE and name == "soup"
    assert np.linalg.norm(velocity) == pytest.approx(0.3)
    steps = {run(Stress(push=0.3), seed)[1].pushes[0][0] for seed in range(5)}
    assert len(steps) > 2


def answer(starts, steps, observations, noise):
    REPLIES.append((list(starts), list(steps), noise.copy()))
    return [np.full((10, 7), start.seed / 100, np.float32) for start in starts]


@pytest.mark.parametrize("jobs", [1, 3])
def test_simulators_run_all_episodes_with_noise_of_their_own(jobs):
    from tests.support.libero import simulate

    REPLIES.clear()
    starts = [Start(task, seed) for task in range(2) for seed in range(3)]
    with rollout.Simulators(jobs, CONDITIONS, simulate) as simulators:
        found = dict(simulators.run(starts, answer, (10, 8)))
        again = dict(simulators.run(starts[:1], answer, (10, 8)))
    assert set(found) == set(starts)
    for start, result in found.items():
        assert result.success == (start.seed > 0) and len(result.actions) == (6 + start.seed if start.seed else 12)
        assert (result.actions == np.float32(start.seed / 100)).all() and result.first.shape == (10, 7)
    noises = {}
    for episodes, steps, noise in REPLIES[:-3]:
        for start, step, each in zip(episodes, steps, noise, strict=True):
            noises[start, step] = each
    assert {step for _, step in noises} == {0, 5, 10}
    assert len({each.tobytes() for each in noises.values()}) == len(noises)
    np.testing.assert_array_equal(REPLIES[-3][2][0], noises[starts[0], 0])  # whatever ran before
    assert again[starts[0]].success is False


def test_simulators_keep_their_scenes():
    """One for each task: none makes the scene of another for the last episodes."""
    from tests.support.libero import simulate

    with rollout.Simulators(3, CONDITIONS, simulate) as simulators:
        for _ in range(3):
            starts = [Start(task, seed) for task in range(3) for seed in range(3)]
            assert len(list(simulators.run(starts, answer, (10, 8)))) == 9
            assert sorted(simulators._tasks.values()) == [0, 1, 2]
        assert len(list(simulators.run([Start(0, seed) for seed in range(12)], answer, (10, 8)))) == 12
        assert list(simulators._tasks.values()).count(0) > 1  # which is worth it


def test_rounds_end_when_another_would_not_fit():
    starts, now = [Start(task, seed) for task in range(2) for seed in range(25)], [0.0]
    assert list(evaluate.rounds(starts, math.inf)) == [starts]
    done = []
    for some in evaluate.rounds(starts, 1.0, lambda: now[0]):
        now[0] += 12.5
        done += some
    assert sorted(start.seed for start in done if start.task == 1) == list(range(20))
    assert len(list(evaluate.rounds(starts, 1e-6, itertools.count().__next__))) == 1  # one at least
    assert [len(some) for some in evaluate.rounds(starts, 10.0)] == [10] * 5


def test_only_common_episodes_are_compared():
    entries = [entry("fp32", seed=seed) for seed in range(4)] + [entry("w4a8", seed=seed) for seed in range(2, 7)]
    entries += [entry("fp32", seed=9, stress={"noise": 5.0})]  # another condition
    assert [(each["arm"], each["seed"]) for each in report.common(entries)] == [
        ("fp32", 2), ("fp32", 3), ("w4a8", 2), ("w4a8", 3), ("fp32", 9),
    ]  # fmt: skip


def test_what_a_simulator_fails_with_is_said():
    from tests.support.libero import dying, failing

    for worker, message in ((failing, "no such scene"), (dying, "process died")):
        with rollout.Simulators(1, CONDITIONS, worker) as simulators, pytest.raises(DuqError, match=message):
            list(simulators.run([Start(0, 0)], answer, (10, 8)))


# --- the command line and reports ----------------------------------------------------------------------------------------


def entry(arm="w4a8", task=0, seed=0, success=True, steps=100, first=0.0, **others):
    result = rollout.Result(success, np.random.default_rng(seed).normal(size=(steps, 7)), np.full((10, 7), first))
    conditions = Conditions("libero_object", 5, 280, stress=Stress(**others.pop("stress", {})))
    return evaluate.line(arm, others.pop("policy", "abc"), Start(task, seed), conditions, result, "llvmpipe") | others


def test_an_episode_that_is_there_is_not_run_again(tmp_path):
    lines = [json.loads(json.dumps(entry(seed=seed))) for seed in range(3)]  # as they are read
    conditions = Conditions("libero_object", 5, 280)

    def wanted(seeds, **others):
        return [evaluate.setting("w4a8", "abc", Start(0, seed), conditions, "llvmpipe") | others for seed in seeds]

    done = evaluate.done_already(lines, wanted(range(5)), tmp_path)
    assert [report.key_of(each) in done for each in wanted(range(5))] == [True, True, True, False, False]
    stressed = wanted([0], stress=vars(Stress(noise=5.0)))
    assert report.key_of(stressed[0]) not in evaluate.done_already(lines, stressed, tmp_path)
    for name, value in {"policy": "def", "renderer": "NVIDIA", "execute": 10, "limit": 100, "plain": False}.items():
        with pytest.raises(DuqError, match=f"{name} .*ame another"):
            evaluate.done_already(lines, wanted([7] if name != "policy" else [0], **{name: value}), tmp_path)


def test_differences_are_taken_in_pairs():
    fp32 = [entry("fp32", seed=seed, success=seed < 8, first=0.0) for seed in range(10)]
    other = [entry("w4a8", seed=seed, success=seed < 6, first=0.5, steps=50) for seed in range(9)]
    alien = [entry("w4a8", seed=0, stress={"push": 1.0})]
    first, second = report.rows([*fp32, *other, *alien], report.condition_of(fp32[0]), "fp32")
    assert (first.arm, first.episodes, first.rate, first.difference, first.error) == ("fp32", 10, 0.8, None, None)
    assert second.episodes == 9 and second.rate == pytest.approx(6 / 9) and second.steps == 50
    assert second.difference == pytest.approx(-2 / 9) and second.error == pytest.approx(0.5)
    assert second.p == pytest.approx(binomtest(2, 2).pvalue)
    assert len(report.conditions([*fp32, *alien])) == 2


@pytest.mark.parametrize("lost, gained", [(0, 0), (1, 0), (9, 3), (3, 9), (5, 5), (40, 12)])
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    reference = [True] * lost + [False] * gained + [True, False]
    found = [False] * lost + [True] * gained + [True, False]
    expected = binomtest(min(lost, gained), lost + gained).pvalue if lost + gained else 1.0
    assert report.mcnemar(reference, found) == pytest.approx(expected)


def test_the_report_of_a_journal(tmp_path, command_line):
    journal = Journal(tmp_path / "e.jsonl")
    for seed in range(4):
        journal.add(entry("fp32", seed=seed))
        journal.add(entry("w4a8", task=seed % 2, seed=seed, success=seed > 0))
        journal.add(entry("w4a8", seed=seed, success=False, stress={"camera": 0.1}))
    table, plot = tmp_path / "t.md", tmp_path / "p.svg"
    done = command_line(report.main, journal.file, "--table", table, "--plot", plot)
    assert done.code == 0 and "75.0" in done.out, done
    text = table.read_text()
    assert "libero_object, permuted places:" in text and "0.1 m camera offset" in text and "| w4a8 | 75.0" in text
    assert plot.read_text().count("success, %") == 2


@pytest.mark.parametrize("content, arguments, message", [
    ("", [], "holds no episodes"),
    ('{"a": 1}\n', [], "line 1 is no episode"),
    ("nonsense\n", [], "line 1 is no JSON object"),
    (json.dumps(entry()) + "\n", ["--reference", "fp32"], "--reference fp32: there are episodes of w4a8"),
    (json.dumps(entry()) + "\n", ["--plot", "/nowhere/p.svg"], "--plot /nowhere/p.svg"),
])  # fmt: skip
def test_a_report_of_something_else(tmp_path, command_line, content, arguments, message):
    (tmp_path / "e.jsonl").write_text(content)
    done = command_line(report.main, tmp_path / "e.jsonl", *arguments)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


def test_packs_called_like_a_naive_scheme_are_not_passed_over(command_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "W4A8").mkdir()
    assert "write ./W4A8 for packs" in command_line(evaluate.main, "--torch", ".@W4A8").err
    assert "give one with --plan" in command_line(evaluate.main, "--torch", ".@./W4A8").err


@pytest.mark.parametrize("arguments, message", [
    ([], "who drives? give one of"),
    (["--plan", "/nowhere/a.plan"], "there is no /nowhere/a.plan"),
    (["--plan", "x="], "--plan x=: names nothing"),
    (["--torch", "."], "give one with --plan"),
    (["--torch", ".@W4A8"], "give one with --plan"),
    (["--torch", ".@W4A9"], "there is no W4A9"),
    (["--torch", "W4A8@."], "there is no W4A8"),
    (["--plan", "a=.", "--plan", "a=.."], "two policies are called a"),
    (["--replay", ".", "--out", "/nowhere/e.jsonl"], "--out /nowhere/e.jsonl"),
])  # fmt: skip
def test_bad_options_are_refused_before_anything_starts(command_line, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = command_line(evaluate.main, *arguments)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_replay_goes_on_from_where_the_episode_is(tmp_path):
    actions = np.arange(8 * 7, dtype=np.float32).reshape(8, 7)
    for task, seed in ((0, 5), (0, 4), (1, 3)):
        demonstrations.save(
            demonstrations.path_of(tmp_path, task, seed), Demonstration(np.zeros((8, 2)), actions + seed, np.zeros(8, bool))
        )
    arm = evaluate.ReplayArm(tmp_path, execute=5)
    first, second, over = arm.answer([Start(0, 0), Start(1, 0), Start(1, 1)], [0, 5, 10], [{}] * 3, np.zeros((3, 1, 1)))
    np.testing.assert_array_equal(first, actions[:5] + 4)
    np.testing.assert_array_equal(second[:3], actions[5:] + 3)
    assert (second[3:, :6] == 0).all() and (over[:, 6] == 1).all()  # it holds on
    demonstrations.save(demonstrations.path_of(tmp_path, 2, 1), Demonstration(np.zeros((8, 2)), actions, np.ones(8, bool)))
    with pytest.raises(DuqError, match="task_2/seed_1.npz: was pushed"):
        evaluate.ReplayArm(tmp_path, execute=5)
    with pytest.raises(DuqError, match="no demonstration of task 7"):
        arm.answer([Start(7, 0)], [0], [{}], np.zeros((1, 1, 1)))


def test_a_wheel_is_packed_without_what_nobody_needs(tmp_path):
    names = (
        "mujoco/__init__.py",
        "mujoco/libmujoco.so",
        "mujoco/included.py",
        "mujoco/include/mujoco/mujoco.h",
        "mujoco/a_test.py",
    )
    with zipfile.ZipFile(tmp_path / "mujoco.whl", "w") as wheel:
        for name in names:
            wheel.writestr(name, name)
    assert list(pack_assets.of_wheel(tmp_path / "mujoco.whl")) == list(names[:3])
