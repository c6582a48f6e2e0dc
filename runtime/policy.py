"""The policy: an opened plan that answers observations with actions."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np

from duq.runtime import checks
from duq.runtime.config import IMAGE_SLOTS, ModelConfig
from duq.runtime.engine import Engine, finite
from duq.runtime.errors import ObservationError, PlanError
from duq.runtime.guidance import Guidance, Prefix
from duq.runtime.limits import LimitCheck
from duq.runtime.plan import Plan
from duq.runtime.preprocess import Checked, ModelInputs, Preprocessor
from duq.runtime.robots import Robot
from duq.runtime.solver import Solver

# What a client was told when it connected and relies on, of `Policy.metadata`; and the parts of a robot's description that
# it sends and gets. A plan that differs in one of them is another policy's.
RELIED_ON = ("robot", "model", "cameras", "action_horizon", "action_dim", "model_action_dim", "max_prompt_tokens")
ROBOT_RELIED_ON = ("cameras", "state", "action_names", "action_units", "prompt_keys")
AHEAD = 2  # observations of a batch that are preprocessed while the engine is busy; each has threads for its own images
Result = TypeVar("Result")


class Policy:
    """A compiled policy with the interface of openpi's: `infer` takes and returns the same dicts.

    threads: CPU threads of the engine (None: all cores). verify: compare every hash of the plan while opening it.
    seed: of the noise that `infer` draws when it is given none. verify_key: a file with an Ed25519 public key, PEM, that the
    plan has to be signed with; so does one that `reload` takes. in_flight: how many calls of a batch a GPU runs at once, each
    with memory for activations of its own, which the first batch takes (None: 3 for a cuda plan, 1 for others).
    Raises PlanError if the plan cannot be used, EngineError if the GPU refuses: it has too little memory, or failed.

    One policy may be shared by threads; they take turns on the engine. After an error it can be used as before, or says at
    each later call that it must be opened again. It does not work in a forked process, and cannot be pickled.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify: bool = True,
        seed: int | None = None,
        verify_key: str | os.PathLike[str] | None = None,
        in_flight: int | None = None,
    ):
        self._path, self._threads, self._verify, self._verify_key = path, threads, verify, verify_key
        self._in_flight = in_flight
        self._outside: Counter[str] = Counter()
        self._noise = np.random.default_rng(seed)
        self._swap = threading.RLock()  # between taking the opened plan and beginning a call of it; never held for long
        self._reloading = threading.Lock()
        self._opened = self._open(path)

    def __enter__(self) -> Policy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a Policy cannot be pickled or copied: it holds an engine of this process; pass the path {os.fspath(self._path)!r}, "
            "and open it where it is to run"
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client may want to know of the policy, in plain JSON types; of a cuda plan also the "program" that runs."""
        return self._opened.metadata

    @property
    def outside_limits(self) -> dict[str, int]:
        """How many chunks had actions outside of the robot's limits, by the action's name; of every action with limits."""
        names = self._opened.preprocessor.robot.limits if self._opened.preprocessor.robot else ()
        return {name: self._outside[name] for name in names}

    @property
    def fingerprint(self) -> str:
        """Tells plans apart: 16 hexadecimal digits of the SHA-256 of the manifest, which has the hashes of all else."""
        text = json.dumps(self._opened.plan.manifest, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self) -> None:
        """Raises EngineError or PlanError, which say what to do, if no call can succeed any more. Waits for nothing."""
        opened = self._opened
        opened.engine.check()
        opened.plan.check_unchanged()

    def warmup(self) -> None:
        """Does now what the first call would do once: page in the weights, allocate, import. Then no file is opened.

        Raises EngineError where there is too little memory, or as `infer`.
        """
        with self._call() as opened:
            opened.warmup()

    def infer(
        self, obs: Mapping[str, Any], noise: np.ndarray | None = None, *, prefix: Prefix | None = None
    ) -> dict[str, Any]:
        """An action chunk for one observation.

        obs: the robot's observation dict or bare model inputs (see `runtime.preprocess.Preprocessor`).
        noise: float32 [H, A], the start of the denoising; drawn if absent. The same noise gives the same actions.
        prefix: the rest of the previous chunk, which guides this one (runtime/guidance.py); PlanError unless `guided`.
        Returns {"actions": float32 [H, robot dims], "policy_timing": milliseconds: "infer_ms" is the whole call,
        "preprocess_ms", "prefix_ms", "denoise_ms" its parts; engines may add others}; for a robot with limits also
        "limits": the actions outside of them (`runtime.limits.LimitCheck.outside`).
        Raises ObservationError, before any work of the model, if the observation or the noise does not fit; EngineError if
        the engine fails or its actions are not finite, or if the policy is closed, failed before or was forked; PlanError if
        the plan's file was written to (replacing it by rename is no harm).
        """
        start = time.perf_counter()
        with self._call() as opened:
            checked = opened.preprocessor.read(obs)
            inputs = opened.preprocessor.finish(checked)
            noise = self._noise_of(opened, noise)
            options = {} if prefix is None else {"guidance": opened.guidance(prefix, checked)}
            return opened.answer(checked, inputs, noise, time.perf_counter() - start, **options)

    @property
    def guided(self) -> bool:
        """Whether `infer` takes a prefix: the engine has to stop between two denoising steps."""
        return self._opened.guided

    def infer_batch(
        self, obs: Sequence[Mapping[str, Any]], noise: Sequence[np.ndarray] | np.ndarray | None = None
    ) -> list[dict[str, Any]]:
        """An action chunk for each observation, in their order and bit for bit as `infer` gives them one after the other.

        noise: float32 [N, H, A], or a list of [H, A] and None. While the engine runs one, or `in_flight` of them, others are
        preprocessed. The times of calls that ran at once overlap.
        Raises as `infer`; an ObservationError names the first observation that does not fit, before any work of the model. A
        PlanError says so where there is too little memory for `in_flight` calls.
        """
        with self._call() as opened:
            listed = _items(obs, "a list of dicts")
            noises = [None] * len(listed) if noise is None else _items(noise, "noise: a list")
            if len(noises) != len(listed):
                raise ObservationError(f"noise: there are {len(noises)} for {len(listed)} observations")
            read = [_item(index, opened.preprocessor.read, each) for index, each in enumerate(listed)]
            drawn = [_item(index, partial(self._noise_of, opened), each) for index, each in enumerate(noises)]
            return opened.answers(read, drawn)

    @property
    def in_flight(self) -> int:
        """How many calls of a batch run at once, where it has as many."""
        return self._opened.engine.in_flight

    def reset(self) -> None:
        """Of openpi's interface, called between episodes: there is nothing that one leaves to the next."""

    def close(self) -> None:
        """Frees the engine, once calls of other threads have ended; later calls raise EngineError. May be called again."""
        self._opened.close()

    def reload(self, path: str | os.PathLike[str] | None = None) -> None:
        """Takes a new plan, from `path` or from where the policy was opened, without a gap.

        It is opened and warmed up beside the old plan, which serves meanwhile: there must be memory for both. Calls that
        have begun end with the plan that they began with. Raises PlanError or EngineError if it cannot be used, and
        PlanError if it is of another robot or shape (RELIED_ON, ROBOT_RELIED_ON); the old plan then goes on.
        """
        self._opened.engine.check_process()
        with self._reloading:
            self._opened.engine.check_open()
            new = self._open(self._path if path is None else path)
            try:
                new.check_serves_clients_of(self._opened)
                new.engine.open_lanes(self._opened.engine.lanes)
                new.warmup()
                with self._swap:
                    self._opened.engine.check_open()  # closed in the meantime: it stays so
                    old, self._opened = self._opened, new
                    self._path = new.plan.path
            except BaseException:
                new.close()
                raise
            old.close()

    def _open(self, path: str | os.PathLike[str]) -> _Opened:
        return _Opened.of(Plan(path, self._verify, self._verify_key), self._threads, self._in_flight, self._outside)

    @contextmanager
    def _call(self) -> Iterator[_Opened]:
        """The plan to use for a call, which stays open until it ends."""
        self._opened.engine.check()  # before the lock, which a fork may have inherited locked
        with self._swap:
            opened = self._opened
            opened.engine.begin()
        try:
            yield opened
        finally:
            opened.engine.end()

    def _noise_of(self, opened: _Opened, given: Any) -> np.ndarray:
        """The noise given, checked, or drawn: float32 [H, A], C order."""
        shape = opened.config.action_horizon, opened.config.action_dim
        if given is None:
            return self._noise.standard_normal(shape, np.float32)
        expected = f"finite float32 {list(shape)}"
        noise = checks.array(given, "noise", expected, max(checks.MAX_VECTOR, shape[0] * shape[1]))
        if noise.shape != shape or noise.dtype != np.float32 or not np.isfinite(noise).all():
            raise ObservationError(f"noise: is {noise.dtype} {list(noise.shape)}, expected {expected}")
        return np.ascontiguousarray(checks.moderate(noise, "noise"))


@dataclass(frozen=True)
class _Opened:
    """A plan put to use."""

    plan: Plan
    config: ModelConfig
    preprocessor: Preprocessor
    engine: Engine
    metadata: dict[str, Any]
    limits: LimitCheck | None
    running: ThreadPoolExecutor  # of the calls of batches
    preparing: ThreadPoolExecutor

    @classmethod
    def of(cls, plan: Plan, threads: int | None, in_flight: int | None, outside: Counter[str]) -> _Opened:
        """outside: where chunks with actions outside of the robot's limits are counted."""
        try:
            config = ModelConfig.from_json(plan.manifest["model"])
            preprocessor = preprocessor_of(plan, config)
            metadata = _metadata(plan.manifest, config, preprocessor)
        except (KeyError, TypeError) as error:
            raise PlanError(f"{plan.path}: its manifest is incomplete ({error}); compile it again") from error
        engine = Engine(plan, threads, in_flight)
        program = getattr(engine.executor, "program", None)  # no other target than cuda has several
        metadata |= {"program": program.to_json()} if program else {}
        robot = preprocessor.robot
        limits = LimitCheck(robot, outside) if robot and robot.limits else None
        running = ThreadPoolExecutor(engine.in_flight, "duq-lane")  # each starts its threads when it first needs them
        preparing = ThreadPoolExecutor(AHEAD, "duq-preprocess")
        return cls(plan, config, preprocessor, engine, metadata, limits, running, preparing)

    def close(self) -> None:
        """Once its calls have ended."""
        self.engine.close()
        for pool in (self.running, self.preparing):
            pool.shutdown(wait=False)

    def warmup(self) -> None:
        self.preprocessor.model_inputs(_blank_observation())
        self.engine.warmup()

    @property
    def guided(self) -> bool:
        return getattr(self.engine.executor, "guided", False)

    def guidance(self, prefix: Prefix, checked: Checked) -> Guidance:
        """The prefix as the model sees it. Raises PlanError if the engine takes none, ObservationError if it does not fit."""
        if not self.guided:
            raise PlanError(
                f"prefix: a plan for {self.metadata['target']} runs all denoising steps as one unit, which cannot be guided; "
                "compile for --target cpu, or mix the chunks with duq.runtime.guidance.blended"
            )
        shape, state = (self.config.action_horizon, self.config.action_dim), checked.robot_state
        prefix.check(shape[0], shape[1] if state is None else self.preprocessor.action_dim)
        target = np.zeros(shape, np.float32)
        target[: len(prefix.actions)] = self.preprocessor.model_actions(np.asarray(prefix.actions), state)
        return Guidance(target, np.asarray(prefix.weights, np.float32)[:, None], prefix.strength)

    def answer(
        self, checked: Checked, inputs: ModelInputs, noise: np.ndarray, preprocessing: float, **options: Any
    ) -> dict[str, Any]:
        """The engine's turn, and what follows it. preprocessing: seconds that the inputs took; options: of the executor."""
        ready = time.perf_counter()
        actions, timing = self.engine.run(inputs, noise, **options)
        with np.errstate(over="ignore", invalid="ignore"):
            actions = self.preprocessor.actions_at(actions, checked.robot_state)
        finite(actions, f"{self.plan.path}: in the robot's units there are", "its norm stats may be of another robot")
        reply: dict[str, Any] = {"actions": actions}
        if self.limits and checked.robot_state is not None:
            reply["limits"] = self.limits.outside(actions)
        seconds = preprocessing + time.perf_counter() - ready
        return reply | {"policy_timing": {"infer_ms": seconds * 1e3, "preprocess_ms": preprocessing * 1e3, **timing}}

    def answers(self, read: Sequence[Checked], noises: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Those of a batch in its order, in which they also begin. While every lane of the engine runs a call, threads preprocess
        what comes next, a few ahead. The first call that fails ends the batch."""

        def prepare(checked: Checked) -> tuple[ModelInputs, float]:
            start = time.perf_counter()
            inputs = self.preprocessor.finish(checked)
            return inputs, time.perf_counter() - start

        lanes, left = self.engine.open_lanes(len(read)), iter(read)
        ahead = deque(self.preparing.submit(prepare, each) for each in islice(left, AHEAD))
        calls, replies = deque[Future[dict[str, Any]]](), []
        try:
            for index, (checked, noise) in enumerate(zip(read, noises, strict=True)):
                inputs, preprocessing = ahead.popleft().result()
                ahead.extend(self.preparing.submit(prepare, each) for each in islice(left, 1))
                if len(calls) == lanes:  # the oldest has the lane that is this one's
                    replies.append(calls.popleft().result())
                calls.append(self.running.submit(self.answer, checked, inputs, noise, preprocessing, lane=index % lanes))
            return replies + [call.result() for call in calls]
        finally:  # behind a call that failed, others may still run
            pending: list[Future[Any]] = [*ahead, *calls]
            for each in pending:
                each.cancel()
            wait(pending)

    def check_serves_clients_of(self, other: _Opened) -> None:
        """Raises PlanError unless a client of the other plan may go on with this one."""
        mine, theirs = self._relied_on(), other._relied_on()
        for name, value in theirs.items():
            if mine[name] != value:
                raise PlanError(
                    f"{self.plan.path}: cannot take the place of {other.plan.path}, whose clients rely on its {name}: "
                    f"it has {checks.shown(mine[name])}, not {checks.shown(value)}; open it as a policy of its own"
                )

    def _relied_on(self) -> dict[str, Any]:
        described = self.preprocessor.robot.to_json() if self.preprocessor.robot else {}
        return {name: self.metadata[name] for name in RELIED_ON} | {
            f"robot's {name}": described.get(name) for name in ROBOT_RELIED_ON
        }


def _metadata(manifest: Mapping[str, Any], config: ModelConfig, preprocessor: Preprocessor) -> dict[str, Any]:
    return {
        "robot": manifest["robot"],
        "model": "pi0.5" if config.pi05 else "pi0",
        "target": manifest["target"],
        "num_steps": manifest["num_steps"],
        "solver": Solver.of(manifest).name,
        "cameras": preprocessor.cameras,
        "action_horizon": config.action_horizon,
        "action_dim": preprocessor.action_dim,
        "model_action_dim": config.action_dim,
        "max_prompt_tokens": config.max_prompt_tokens,
        "checkpoint": manifest["checkpoint"]["fingerprint"],
    }


def _items(values: Any, expected: str) -> Sequence[Any]:
    """What is to be a batch, as a sequence; ObservationError if it is none."""
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        raise ObservationError(f"a batch is {expected}, got {type(values).__name__}")
    return values if isinstance(values, (list, tuple)) else list(values)


def _item(index: int, work: Callable[[Any], Result], value: Any) -> Result:
    """work(value) for one item of a batch, whose index an ObservationError then names."""
    try:
        return work(value)
    except ObservationError as error:
        raise ObservationError(f"item {index} of the batch: {error}") from error


def preprocessor_of(plan: Plan, config: ModelConfig) -> Preprocessor:
    """What the plan says about the conversion of observations, put to use."""
    manifest = plan.manifest
    return Preprocessor(
        config,
        robot=Robot.from_json(described) if (described := manifest.get("robot_description")) else manifest["robot"],
        layout=manifest["checkpoint"]["layout"],
        norm_stats=manifest["norm_stats"],
        tokenizer=plan.read("tokenizer.model") if "tokenizer.model" in plan.names else None,
        cameras=manifest["cameras"],
        transforms=manifest.get("transforms"),
    )


def _blank_observation() -> dict[str, Any]:
    return {
        "image": {IMAGE_SLOTS[0]: np.zeros((32, 48, 3), np.uint8)},  # of a size that has to be resized
        "state": np.zeros(1, np.float32),
        "tokenized_prompt": np.zeros(1, np.int64),
        "tokenized_prompt_mask": np.ones(1, bool),
    }
