"""A scripted expert for LIBERO-Object: picks the target up and puts it into the basket, knowing where everything is.

It decides anew in each step from where things are, so it recovers from pushes, slips and misses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from duq.examples.libero.scene import ACTION_DIM, Scene

# The hand around the point between its fingertips, m: half of its extent along the way the fingers close and across, and how
# far above that point it begins.
FINGERS, PALM = (0.070, 0.016, -0.012), (0.106, 0.034, 0.038)
OPENING = 0.074  # m between the fingers that an object may have
MARGIN = 0.006  # m to leave between the hand and what it is not to touch
YAWS = np.linspace(-np.pi / 2, np.pi / 2, 24, endpoint=False)  # the hand looks the same after half a turn

HOVER = 0.06  # m above the object until the hand is over it
PASS = 0.08  # m above that on the way, to pass over others
OVER_BASKET = 0.025  # m between a carried object and the rim
RELEASE = 0.145  # m above the ground, the hand's lowest over the basket: the palm stays clear of the rim
CENTERED = 0.012  # m from above the object or the basket: near enough to go down
GRIPPED = 0.009  # m between the hand and where it is to grip: near enough to close
ELBOW = 0.68  # m from the shoulder to the wrist, a little less than with the arm straight, where it sticks
SHOULDER, WRIST = (
    0.333,
    (0.088, 0.21),
)  # m: its height; how far the wrist is behind and above the point between the fingertips
FAST, TURN_FAST = 1.8, 1.6  # gains of the hand's motion and rotation
MOVE, TURN = 0.05, 0.5  # of an action of 1: m, rad

OPEN, CLOSE = -1.0, 1.0


@dataclass(frozen=True)
class Grasp:
    """offset: from the object's body to the point between the fingertips, m [3], as the object lies.
    yaw: of the axis along which the fingers close, rad from the world's y axis, which it has at rest.
    below: how far the object reaches below that point, m.
    clearance: from everything else, m; negative where the hand would touch."""

    offset: np.ndarray
    yaw: float
    below: float
    clearance: float


def in_hand(points: np.ndarray, place: np.ndarray, yaw: float) -> np.ndarray:
    """Points [N, 3] in the frame of a hand at `place` [3]: along the closing axis, across, above."""
    moved, sine, cosine = points - place, np.sin(yaw), np.cos(yaw)
    closing = moved[:, 0] * -sine + moved[:, 1] * cosine
    across = moved[:, 0] * cosine + moved[:, 1] * sine
    return np.stack((closing, across, moved[:, 2]), axis=-1)


def clearance(obstacles: np.ndarray, place: np.ndarray, yaw: float) -> float:
    """Least distance, m, of points [N, 3] from the open hand at `place` [3], in the plane; negative inside of it."""
    if not len(obstacles):
        return np.inf
    local = in_hand(obstacles, place, yaw)
    least = np.inf
    for length, width, height in (FINGERS, PALM):
        outside = np.abs(local[local[:, 2] > height, :2]) - (length, width)
        if len(outside):
            apart = np.linalg.norm(outside.clip(0), axis=1) + outside.max(axis=1).clip(max=0)
            least = min(least, apart.min())
    return float(least)


def choose_grasp(body: np.ndarray, target: np.ndarray, obstacles: np.ndarray) -> Grasp:
    """How to grip an object whose surface is `target` [N, 3] and whose body is at `body` [3], among `obstacles` [M, 3].

    Of the grasps that fit between the fingers and touch nothing, the narrowest with the least rotation; where none
    touches nothing, the one with the most room.
    """
    low, high = target[:, 2].min(), target[:, 2].max()
    height = max(low + 0.012, min((low + high) / 2, high - 0.02), high - PALM[2] + 0.004)
    held = target[np.abs(target[:, 2] - height) < max(0.02, (high - low) / 4)]
    best = None
    for turned in YAWS:
        local = in_hand(held, body, turned)
        sides = local[:, 0].min(), local[:, 0].max()
        ends = local[:, 1].min(), local[:, 1].max()
        middle = np.array([-np.sin(turned), np.cos(turned)]) * np.mean(sides)
        middle = middle + np.array([np.cos(turned), np.sin(turned)]) * np.mean(ends)
        offset = np.append(middle, height - body[2])
        room = min(clearance(obstacles, body + offset, turned), 2 * (OPENING - (sides[1] - sides[0])) + MARGIN)
        narrow = sides[1] - sides[0]
        rank = min(room, MARGIN), -abs(turned) - 20 * narrow
        if best is None or rank > best[0]:
            best = rank, Grasp(offset, float(turned), float(height - low), room)
    assert best is not None
    return best[1]


class Expert:
    """Plans a grasp when it is made, for the scene as it is then; `action` decides step by step."""

    def __init__(self, scene: Scene):
        self._scene, self._plans = scene, 0
        self._plan()

    def _plan(self) -> None:
        scene = self._scene
        others = [scene.surface(name) for name in scene.bodies if name != scene.target]
        self._grasp = choose_grasp(scene.position(scene.target), scene.surface(scene.target), np.concatenate(others))
        self._planned = scene.position(scene.target)
        self._holding, self._closing = False, 0
        self._rim = scene.surface(scene.goal)[:, 2].max()

    def action(self) -> np.ndarray:
        """What to do now, float32 [7]."""
        scene, grasp = self._scene, self._grasp
        hand, body = scene.hand_position(), scene.position(scene.target)
        grip = body + grasp.offset
        if self._closing == 0 and not self._holding and np.linalg.norm((body - self._planned)[:2]) > 0.015:
            self._plan()  # it was moved
            return self.action()
        if self._holding and np.linalg.norm(hand - grip) > 0.04:
            self._plan()  # it slipped
            return self.action()
        gripper = OPEN
        if self._holding:
            place, gripper = self._carry(hand, body)
        else:
            place = self._reach(hand, grip)
            if self._closing or np.linalg.norm(hand - grip) < GRIPPED:
                place, gripper = grip, CLOSE
                self._closing += 1
                self._holding = self._closing > 6
        return self._towards(place, gripper)

    def _reach(self, hand: np.ndarray, grip: np.ndarray) -> np.ndarray:
        """Where to go for the object: over it, and down as far as the hand is over it."""
        turn = abs(_difference(self._grasp.yaw, _yaw(self._scene.hand_rotation())))
        aside = np.linalg.norm((hand - grip)[:2]) + 0.02 * turn
        above = HOVER * np.clip((aside - GRIPPED) / CENTERED, 0, 1) + PASS * np.clip((aside - 0.03) / 0.05, 0, 1)
        place = grip + (0, 0, above)
        ready = np.clip(1.5 - (place[2] - hand[2]) / 0.04, 0, 1)  # rise first, then go aside
        return np.append(hand[:2] + (place - hand)[:2] * ready, place[2])

    def _carry(self, hand: np.ndarray, body: np.ndarray) -> tuple[np.ndarray, float]:
        """Where to go with the object, and whether to hold it still."""
        scene, grasp = self._scene, self._grasp
        basket = scene.position(scene.goal)
        aside = basket[:2] - (body + grasp.offset * (1, 1, 0))[:2]
        above = min(self._rim + OVER_BASKET + grasp.below, highest(float(np.linalg.norm((hand - scene.base())[:2]))))
        far = np.linalg.norm(aside)
        if far < CENTERED + 0.02:
            lowest = max(RELEASE, grasp.below + 0.02)
            done = hand[2] < lowest + 0.01
            return np.append(hand[:2] + aside, lowest), OPEN if done else CLOSE
        ready = np.clip((hand[2] - above + 0.05) / 0.04, 0, 1)  # rise first, then go aside
        return np.append(hand[:2] + aside * max(ready, 0.0), above), CLOSE

    def _towards(self, place: np.ndarray, gripper: float) -> np.ndarray:
        scene = self._scene
        rotation = scene.hand_rotation()
        wanted = attitude(self._grasp.yaw)
        turn = Rotation.from_matrix(wanted @ rotation.T).as_rotvec()
        action = np.zeros(ACTION_DIM, np.float32)
        action[:3] = FAST * (place - scene.hand_position()) / MOVE
        action[3:6] = TURN_FAST * turn / TURN
        largest = np.abs(action[:3]).max()
        action[:3] /= max(largest, 1.0)  # straight on
        action[:6] = action[:6].clip(-1, 1)
        action[6] = gripper
        return action


def highest(distance: float) -> float:
    """How high, m, the hand can be held so far, m, from the arm's base."""
    away = distance - WRIST[0]
    return SHOULDER - WRIST[1] + float(np.sqrt(max(ELBOW**2 - away**2, 0.0)))


def attitude(yaw: float) -> np.ndarray:
    """[3, 3]: the hand points down and its fingers close along the world's y axis, turned by `yaw` rad."""
    closing = np.array([-np.sin(yaw), np.cos(yaw), 0.0])
    down = np.array([0.0, 0.0, -1.0])
    return np.stack((closing, np.cross(down, closing), down), axis=1)


def _yaw(rotation: np.ndarray) -> float:
    """Of the closing axis from the world's y axis, rad."""
    return float(np.arctan2(-rotation[0, 0], rotation[1, 0]))


def _difference(first: float, second: float) -> float:
    """Of two angles, -pi to pi."""
    return float((first - second + np.pi) % (2 * np.pi) - np.pi)
