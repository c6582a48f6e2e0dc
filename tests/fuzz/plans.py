"""Plans to be damaged and rewritten: the least that the compiler makes for a CPU, and one made by hand for a GPU.

Flipped bits and edits of the container leave the hashes as they were: what is opened all the same has to answer as the original.
A rewritten plan has right hashes, as if by someone who means harm: it is refused, or answers in numbers. A plan is code that runs,
so its graphs and its kernels are not rewritten: nothing can be said of what they would do.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from duq.plugins import driver
from duq.runtime import Policy, inspect
from duq.runtime.errors import PlanError
from duq.runtime.executors import cuda
from duq.runtime.plan import MANIFEST, Plan, PlanWriter
from tests.fuzz.driver import ObservedDriver, ObservedLibrary
from tests.fuzz.judge import FOREIGN, WRONG, Failure, judged
from tests.fuzz.mutate import damage, edit_json
from tests.support.observations import TOKENS, image, libero
from tests.support.plans import schedule, write_cuda_plan

TARGETS = ("cpu", "cuda")
Attempt = Callable[[int], str]  # of a seed: how it ended
LONG_AGO = (1e9, 1e9)  # a file that was just written is opened a tick later


def make_plans(folder: Path) -> None:
    """Writes cpu.plan and cuda.plan."""
    compile_least(folder / "cpu.plan")
    write_cuda_plan(folder / "cuda.plan", cameras=1, arena_bytes=1 << 18)


def compile_least(path: Path) -> None:
    """A W4A8 policy of 0.6 MB for LIBERO, of one layer, 4 actions and 2 steps."""
    import torch
    from rich.progress import Progress

    from duq.compiler.accuracy.synthetic import synthetic_observations
    from duq.compiler.checkpoint import load_checkpoint, synthetic
    from duq.compiler.checkpoint.synthetic.files import TOKENIZER_SIZE
    from duq.compiler.pipeline import compile_policy, quantize_checkpoint
    from duq.compiler.quant import load_recipe
    from duq.compiler.quant.recipe import DEFAULT_PRESET
    from duq.compiler.targets import Options
    from duq.runtime.config import GemmaConfig, VisionConfig
    from duq.runtime.preprocess import Preprocessor

    torch.set_num_threads(1)
    gemma = GemmaConfig(64, 1, 128, 2, 1, 32)
    synthetic.VARIANTS["least"] = (VisionConfig(32, 1, 64, 2, image_size=28), gemma, gemma, TOKENIZER_SIZE)
    checkpoint = path.with_suffix(".checkpoint")
    synthetic.make_checkpoint(checkpoint, variant="least", robot="libero", action_horizon=4)
    source = load_checkpoint(checkpoint)
    inputs = [Preprocessor(source.config).model_inputs(each) for each in synthetic_observations(source.config, 3, 2)]
    with Progress(disable=True) as progress:
        quantization = quantize_checkpoint(source, load_recipe(DEFAULT_PRESET, environment={}), inputs, progress)
        compile_policy(source, quantization, path, Options(robot="libero", num_steps=2), progress)


# --- what a plan answers ----------------------------------------------------------------------------------------------

BARE = {"image": {"base_0_rgb": image(0)}, "state": np.linspace(-1, 1, 8, dtype=np.float32), **TOKENS}
OBSERVATIONS = {"cpu": libero(), "cuda": BARE}


def noise_of(policy: Policy) -> np.ndarray:
    shape = policy.metadata["action_horizon"], policy.metadata["model_action_dim"]
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def answer(path: Path, target: str) -> tuple[np.ndarray, str]:
    """The actions float32 [H, robot dims] that a plan gives to the one observation, and what else has to be the same.

    Raises PlanError and the like; Failure if they are not finite or of another shape than the plan says.
    """
    if target == "cuda":
        return _answer_on_gpu(path)
    with Policy(path, threads=1) as policy:
        return _actions(policy, target), json.dumps(policy.metadata)


def _answer_on_gpu(path: Path) -> tuple[np.ndarray, str]:
    gpu = ObservedDriver(schedule())
    driver._driver, cuda.CublasLt = lambda: gpu, lambda: ObservedLibrary(gpu)  # type: ignore[assignment,misc]
    cuda.STAGING_BYTES, cuda.WORKSPACE_BYTES = 2 << 10, 1 << 10  # which only cost time here
    driver._device.cache_clear()
    with Policy(path) as policy:
        return _actions(policy, "cuda"), json.dumps(policy.metadata) + gpu.digest


def _actions(policy: Policy, target: str) -> np.ndarray:
    actions = policy.infer(OBSERVATIONS[target], noise_of(policy))["actions"]
    check_actions(actions, policy)
    return actions


def check_actions(actions: Any, policy: Policy) -> None:
    shape = policy.metadata["action_horizon"], policy.metadata["action_dim"]
    if not isinstance(actions, np.ndarray) or actions.shape != shape or actions.dtype != np.float32:
        raise Failure(WRONG, f"actions are {type(actions).__name__} {getattr(actions, 'shape', '')}, expected {shape}")
    if not np.isfinite(actions).all():
        raise Failure(WRONG, "actions are not finite")


def check_same(found: tuple[np.ndarray, str], expected: tuple[np.ndarray, str]) -> None:
    if not np.array_equal(found[0], expected[0]) or found[1] != expected[1]:
        raise Failure(WRONG, f"answers otherwise than the original: {found[0].ravel()[:3]}, not {expected[0].ravel()[:3]}")


def how(error: Exception | None) -> str:
    return "accepted" if error is None else type(error).__name__


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    os.utime(path, LONG_AGO)
    return path


# --- damaged: hashes as they were -------------------------------------------------------------------------------------


@contextmanager
def damaged(target: str, edit: Callable[[bytes, Random], bytes], name: str, folder: Path) -> Iterator[Attempt]:
    """Tries of a plan whose bytes an edit changes."""
    original = (folder / f"{target}.plan").read_bytes()
    expected = answer(write(folder / "x.plan", original), target)

    def attempt(seed: int) -> str:
        path = write(folder / "x.plan", edit(original, Random(f"{name} {seed}")))
        return how(judged(f"{name}, seed {seed}", lambda: check_same(answer(path, target), expected), (PlanError,)))

    yield attempt


def flip(data: bytes, random: Random) -> bytes:
    """One to ten flipped bits: anywhere, or in what is no entry's content: headers, manifest, directory."""
    edited, between = bytearray(data), random.random() < 0.5
    for _ in range(random.choice((1, 1, 1, 2, 10))):
        spans = _between(data) if between else [(0, len(data))]
        start, end = random.choices(spans, [end - start for start, end in spans])[0]
        edited[random.randrange(start, end)] ^= 1 << random.randrange(8)
    return bytes(edited)


_SPANS: dict[bytes, list[tuple[int, int]]] = {}


def _between(data: bytes) -> list[tuple[int, int]]:
    """What of a plan is no entry's content: (start, end)."""
    key = data[-64:]
    if key not in _SPANS:
        entries = sorted((each["offset"], each["bytes"]) for each in _manifest(data)["entries"].values())
        starts = [0, *(offset + size for offset, size in entries)]
        ends = [*(offset for offset, _ in entries), len(data)]
        _SPANS[key] = [(start, end) for start, end in zip(starts, ends, strict=True) if end > start]
    return _SPANS[key]


def _manifest(data: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        found: dict[str, Any] = json.loads(archive.read(MANIFEST))
    return found


_CENTRAL = 46  # bytes of a record of the directory before the name


def edit_container(data: bytes, random: Random) -> bytes:
    """An edit of the zip, of its records or its blocks, as tools, disks and transfers make them."""
    edits: tuple[Callable[[bytes, Random], bytes], ...] = (
        _cut, _moved, _blocks, _blocks, _directory, _directory, _directory, _local, _local, _end, _packed_again, _joined,
    )  # fmt: skip
    return random.choice(edits)(data, random)


def _cut(data: bytes, random: Random) -> bytes:
    start = random.choice((0, 0, 1, 64, random.randrange(len(data))))
    return data[start : random.choice((len(data), len(data) - 1, len(data) - 22, random.randrange(len(data))))]


def _moved(data: bytes, random: Random) -> bytes:
    """Bytes in front of it, behind it or inserted."""
    extra = random.choice((b"\0", bytes(64), bytes(4096), random.randbytes(100), data[:4096], data[-500:]))
    at = random.choice((0, len(data), random.randrange(len(data))))
    return data[:at] + extra + data[at:]


def _blocks(data: bytes, random: Random) -> bytes:
    """A block that was lost, or written to another place."""
    edited, size = bytearray(data), random.choice((64, 512, 4096, 65536))
    at, other = (random.randrange(0, len(data), min(size, 512)) for _ in range(2))
    size = min(size, len(data) - max(at, other))
    block = random.choice((bytes(size), data[other : other + size], b"\xff" * size))
    edited[at : at + size] = block
    if random.random() < 0.3:
        edited[other : other + size] = data[at : at + size]
    return bytes(edited)


def _records(data: bytes) -> list[tuple[int, int]]:
    """The records of the zip's directory: (start, end)."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        at, found = archive.start_dir, []
    while data[at : at + 4] == b"PK\x01\x02":
        end = at + _CENTRAL + sum(struct.unpack("<HHH", data[at + 28 : at + 34]))
        found.append((at, end))
        at = end
    return found


_NUMBERS = (0, 1, 2, 8, 64, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def _directory(data: bytes, random: Random) -> bytes:
    """A record of the directory that is lost, twice there, another's, or has another number in it."""
    records = _records(data)
    (start, end), (other, other_end) = random.choice(records), random.choice(records)
    kind = random.randrange(5)
    if kind == 0:
        return data[:start] + data[end:]
    if kind == 1:
        return data[:start] + data[other:other_end] + data[start:]
    if kind == 2:
        edited = bytearray(data)
        edited[start + 42 : start + 46] = data[other + 42 : other + 46]  # where its local header is
        return bytes(edited)
    if kind == 3:
        name = random.choice((b"", b"x", b"../x", b"manifest.json", b"weights/\xff", data[other + 46 : other + 56]))
        length = struct.unpack("<H", data[start + 28 : start + 30])[0]
        edited = bytearray(data)
        edited[start + 46 : start + 46 + length] = name.ljust(length, b"_")[:length]
        return bytes(edited)
    return _other_number(data, start, random.choice((4, 6, 8, 10, 16, 20, 24, 28, 30, 32, 34, 36, 38, 42)), random)


def _local(data: bytes, random: Random) -> bytes:
    """Another number in an entry's local header."""
    start, _ = random.choice(_records(data))
    header = struct.unpack("<I", data[start + 42 : start + 46])[0]
    return _other_number(data, header, random.choice((0, 4, 6, 8, 10, 14, 18, 22, 26, 28)), random)


def _end(data: bytes, random: Random) -> bytes:
    """Another number in the record at the end, or a comment, with or without another such record in it."""
    at = data.rfind(b"PK\x05\x06")
    if random.random() < 0.6:
        return _other_number(data, at, random.choice((4, 6, 8, 10, 12, 16, 20)), random)
    comment = random.choice((b"x", random.randbytes(40), data[at:], b"PK\x05\x06" + bytes(18), bytes(0xFFFF)))
    return data[: at + 20] + struct.pack("<H", len(comment)) + comment


def _other_number(data: bytes, record: int, place: int, random: Random) -> bytes:
    edited, size = bytearray(data), random.choice((2, 4))
    old = int.from_bytes(data[record + place : record + place + size], "little")
    number = random.choice((*_NUMBERS, old + 1, old - 1, old ^ 8, 2 * old)) % (1 << 8 * size)
    edited[record + place : record + place + size] = number.to_bytes(size, "little")
    return bytes(edited)


def _packed_again(data: bytes, random: Random) -> bytes:
    """By another tool: compressed, in another order, without padding."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    if random.random() < 0.5:
        random.shuffle(entries)
    if random.random() < 0.3:
        entries.pop(random.randrange(len(entries)))
    file, compression = BytesIO(), random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, compression)  # of no date: equal seeds, equal bytes
    return file.getvalue()


def _joined(data: bytes, random: Random) -> bytes:
    """Two files in one."""
    other = bytearray(data)
    other[random.randrange(len(other) // 2)] ^= 1
    return random.choice((data + data, bytes(other) + data, data + bytes(other), data[: len(data) // 2] + data))


# --- rewritten: hashes that are right ---------------------------------------------------------------------------------


@contextmanager
def rewritten(target: str, name: str, folder: Path) -> Iterator[Attempt]:
    """Tries of a plan whose manifest, schedule, tokenizer, embedding or weights were edited, and everything hashed again."""
    entries, manifest = _contents(folder / f"{target}.plan")

    def attempt(seed: int) -> str:
        path = write_rewritten(folder / "x.plan", *_rewrite(dict(entries), manifest, Random(f"{name} {seed}")))
        return how(judged(f"{name}, seed {seed}", lambda: answer(path, target)))

    yield attempt


@contextmanager
def manifests(folder: Path) -> Iterator[Attempt]:
    """Tries of edited manifests: the plan is opened, printed in every way that duq-inspect has, and used."""
    entries, manifest = _contents(folder / "cpu.plan")

    def attempt(seed: int) -> str:
        random, edited, where = Random(f"manifest {seed}"), manifest, f"manifest, seed {seed}"
        for _ in range(random.choice((1, 1, 2, 5))):
            edited = edit_document(edited, random)
        path = write_rewritten(folder / "x.plan", entries, edited)
        refused = judged(f"{where}, opened", lambda: Plan(path).close(), (PlanError,))
        for options in ((), ("--json",), ("--all",)):
            judged(f"{where}, duq-inspect {' '.join(options)}", partial(_inspect, path, options, refused is not None), ())
        return how(judged(where, lambda: answer(path, "cpu")))

    yield attempt


def _inspect(path: Path, options: tuple[str, ...], refused: bool) -> None:
    """As the command does. Raises Failure where it prints what cannot be opened, or fails otherwise than in one line."""
    out, err = StringIO(), StringIO()
    argv, sys.argv = sys.argv, ["duq-inspect", str(path), *options]
    code: object = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            inspect.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
    if code not in (0, 2) or refused and not code:
        raise Failure(
            FOREIGN, f"exit code {code}, {'after' if refused else 'without'} a PlanError: {err.getvalue()[-500:]}"
        )
    if code and (not err.getvalue().startswith("error: ") or err.getvalue().count("\n") != 1):
        raise Failure(FOREIGN, f"not one line: {err.getvalue()[:500]}")
    if code == 0 and options == ("--json",):
        json.loads(out.getvalue())


def _contents(path: Path) -> tuple[dict[str, bytes], bytes]:
    """The entries of a plan, and its manifest."""
    plan = Plan(path)
    return {name: plan.read(name) for name in plan.names}, plan._text


def _rewrite(entries: dict[str, bytes], manifest: bytes, random: Random) -> tuple[dict[str, bytes], bytes]:
    data = [each for each in entries if not each.startswith(("graph/", "cubin/", "ptx/"))]
    schedules = [each for each in data if each.startswith("schedule/")]
    kind = random.randrange(8)
    if kind == 0:
        entries.pop(random.choice(list(entries)))
    elif kind == 1:
        one, other = random.choice(data), random.choice(data)
        entries[one], entries[other] = entries[other], entries[one]
    elif kind < 4 and schedules:
        edited = random.choice(schedules)
        for _ in range(random.choice((1, 1, 2))):
            entries[edited] = edit_document(entries[edited], random)
    elif kind < 4:
        edited = random.choice(data)
        found = damage(entries[edited], random)
        entries[edited] = found if random.random() < 0.3 else (found + entries[edited])[: len(entries[edited])]
    else:
        for _ in range(random.choice((1, 1, 2, 3))):
            manifest = edit_document(manifest, random)
    return entries, manifest


def edit_document(data: bytes, random: Random) -> bytes:
    """An edit of JSON; as it was where an edit before has left none that can be edited."""
    try:
        return edit_json(data, random)
    except (ValueError, RecursionError):
        return data


def write_rewritten(path: Path, entries: dict[str, bytes], manifest: bytes) -> Path:
    """The entries with a manifest that is as it is given, but for places and hashes where it says what it should of them."""
    with PlanWriter(path) as plan:
        for name, data in entries.items():
            plan.write(name, data)
        try:
            document = json.loads(manifest)
            if isinstance(document.get("entries"), dict):
                document["entries"] = {
                    name: plan._entries.get(name, said) if isinstance(said, dict) and len(said) == 3 else said
                    for name, said in document["entries"].items()
                }
            manifest = json.dumps(document, indent=1).encode("utf-8", "surrogatepass")
        except (ValueError, AttributeError, RecursionError):
            pass  # it is no JSON any more
        plan._zip.writestr(zipfile.ZipInfo(MANIFEST), manifest)
        plan._zip.close()
        plan._draft.publish()
    os.utime(path, LONG_AGO)
    return path
