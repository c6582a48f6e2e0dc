"""Files that name something else than they hold, numbers that no policy has, patterns that never end: refused by name."""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from pathlib import Path
from time import process_time

import numpy as np
import pytest

from duq.compiler import checks
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.metadata import read_metadata
from duq.compiler.checkpoint.norm_stats import checked_modes, checked_stats
from duq.compiler.checkpoint.ranges import RANGES, checked, in_range
from duq.compiler.checkpoint.synthetic.files import train_tokenizer
from duq.compiler.data import check_source
from duq.compiler.errors import CalibrationError, CheckpointError, DuqError, RecipeError
from duq.compiler.patterns import PATIENCE_S, Pattern
from duq.compiler.policy_options import POLICY_OPTIONS
from duq.compiler.quant import Quantization, Recipe, load_recipe
from duq.compiler.quant.linears import select_linears
from duq.compiler.quant.store import load_quantization
from duq.runtime.errors import PlanError
from duq.runtime.robots import load_robot
from duq.runtime.tokenizer import Tokenizer
from tests.fuzz.kinds import KINDS, NAME, ROBOT
from tests.support.quant_policy import tiny_checkpoint, tiny_config


def directory(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere")


def circle(path: Path) -> None:
    path.symlink_to(path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [directory, dangling, circle, fifo])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "metadata.pt",
        "model.safetensors",
        "tokenizer.model",
        "adapter_config.json",
        "model.safetensors.index.json",
    ],
)
def test_what_is_no_file_does_not_count_as_absent(name, make, tmp_path):
    KINDS["safetensors"].make(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: is a (folder|link that leads nowhere|device, FIFO)"):
        load_checkpoint(tmp_path)


def test_assets_that_are_no_folder(tmp_path):
    KINDS["safetensors"].make(tmp_path)
    (tmp_path / "assets").symlink_to("/nowhere")
    with pytest.raises(CheckpointError, match="assets: expected a folder of norm stats"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"std": [1.0, -0.5]}, r"state.std at index 1 is -0.5, expected a number from 0 to 1e\+09"),
        ({"std": [1.0, 1e30]}, "state.std at index 1 is 1e.30"),
        ({"mean": [math.nan, 0.0]}, "state.mean must be a list of finite numbers"),
        ({"mean": [0.0, 10**400]}, "state.mean must be a list of finite numbers"),
        ({"mean": [0.0, -1e12]}, "state.mean at index 1 is -1"),
        ({"mean": [True, False]}, "state.mean must be a list of finite numbers"),
        ({"q01": [0.0, 2.0], "q99": [1.0, 1.0]}, "state at index 1 has q01 2 above q99 1"),
        ({"mean": [0.0] * 5000, "std": [1.0] * 5000}, "state.mean must be a list of finite numbers"),
    ],
)
def test_statistics_that_cannot_be_right(change, message):
    good = {"mean": [0.0, 0.0], "std": [1.0, 0.0], "q01": [-1.0, 0.0], "q99": [1.0, 0.0]}
    assert checked_stats(Path("stats"), good, good, 1e-6)["state"] == good
    with pytest.raises(CheckpointError, match=message):
        checked_stats(Path("stats"), good | change, good, 1e-6)


@pytest.mark.parametrize("epsilon", [math.nan, -1e-8, 1e308, math.inf, 0, "1e-8", None, True, 10**400])
def test_epsilons_that_cannot_be_right(epsilon):
    stored = {"mean": [0.0], "std": [1.0]}
    assert checked_modes("file", "action", "MEAN_STD", stored, 1e-8)["epsilon"] == 1e-8
    with pytest.raises(CheckpointError, match="file: eps of action is .*, expected a number from 1e-30 to 1"):
        checked_modes("file", "action", "MEAN_STD", stored, epsilon)


@pytest.mark.parametrize("name", RANGES)
def test_ranges_hold_their_ends_and_nothing_beyond(name):
    low, high = RANGES[name]
    assert in_range(low, name) and in_range(high, name) and checked(low, name, "x") == low
    beyond = [
        high + 1 if isinstance(high, int) else high * 1.01,
        math.nan,
        math.inf,
        -math.inf,
        None,
        "1",
        True,
        [1],
        10**400,
    ]
    beyond += [low - 1 if isinstance(low, int) else math.nextafter(low, -math.inf)]
    beyond += [low + 0.5] if isinstance(low, int) else []
    for value in beyond:
        with pytest.raises(CheckpointError, match="^x is .*, expected a "):
            checked(value, name, "x")


def test_options_have_the_ranges_of_files():
    for name in ("num_steps", "action_horizon", "max_prompt_tokens"):
        (option,) = POLICY_OPTIONS[name].__metadata__
        assert (option.min, option.max) == RANGES[name]


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("a{4294967296}", "repeats more than 1,000 times"),
        ("((a{1000}){1000}){10}", "repeats more than 1,000 times"),
        ("(abc){e<=5}", "has a brace that is no count"),
        ("[", "is not a regular expression"),
        ("(?P<x>a)(?P<x>b)", "is not a regular expression"),
        ("(" * 3000, "is not a regular expression: RecursionError"),
        ("x" * 5000, "has 5,000 characters, at most 4,000 are read"),
    ],
)
def test_patterns_that_are_refused(text, message):
    with pytest.raises(RecipeError, match=f"^include .{{1,110}} {message}"):
        Pattern(text, "include", RecipeError)


def test_patterns_that_never_end():
    slow, begin = Pattern("(x|xx)+(x|xx)+y", "include", RecipeError), process_time()
    for _ in range(5):  # also when it is asked again and again
        with pytest.raises(RecipeError, match="include .* takes too long to match"):
            slow.is_in("x" * 200 + " y")
    assert process_time() - begin < 2 * PATIENCE_S + 1


def test_patterns_mean_what_they_mean_in_python():
    name = "llm.layers.3.mlp.down_proj"
    for text, found in {
        r"(?!vision)": True, r"^(?!.*mlp)": False, r"(?i)LLM": True, r"layers\.[0-3]\.": True, r"a{2,}|m{,1}lp": True,
        r"\{x": False, r"[{]": False, "": True, "(?!)": False, r"(\.)\w+\1": True,
    }.items():  # fmt: skip
        assert Pattern(text, "x", RecipeError).is_in(name) is found, text
    assert Pattern("llm", "x", RecipeError).starts(name) and not Pattern("mlp", "x", RecipeError).starts(name)
    assert Pattern("llm.*proj", "x", RecipeError).is_all_of(name) and not Pattern("llm", "x", RecipeError).is_all_of(name)


RECIPES = [
    ("scheme: [a]", "unknown scheme"), ("scheme: {a: b}", "unknown scheme"),
    ("weight_bits: .inf", "weight_bits is inf; expected"),
    ("weight_bits: 4.5", "expected int"),
    (f"weight_bits: 1{'0' * 400}", "unknown weight_bits"),
    ("include: 'a{4294967296}'", "repeats"),
    ("layer_bits: {'(?i)x': 8}", "layer_bits .*global flags not at the start"),
    ("layer_bits: ['x:²']", "not of the form PATTERN:BITS"),
    ("damping: .nan", "damping is nan"), ("calibration_steps: 1000000000", "calibration_steps is 1000000000"),
    ("exclude: '(x+x+)+y'\ninclude: ''", None), ("a: &a [x]\nscheme: *a", "an alias .*a. stands in it"), ("1: 2", "1 is no key"),
    ("[" * 3000, "does not parse"), ("2001-99-99: x", "does not parse"), ("scheme: !!python/object:os.system x", "does not parse"),
    ("activation_percentile: 1e400", "activation_percentile is"), ("auto_bits: .nan", "auto_bits is nan"),
    ("permute: 7", "permute is 7"), ("layer_bits: 7", "layer_bits is 7"), ("\x00", "does not parse"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", RECIPES)
def test_recipes(text, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    if message is None:
        assert select_linears(load_recipe(str(file), environment={}), tiny_config())
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(file), environment={})


# --- files that ask for memory, or run something ------------------------------------------------------------------------


def _metadata(file: Path, pickled: bytes, **options) -> Path:
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
    return file


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo of 2^31 entries in C
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",  # bytes to make room for
        b"\x80\x02X\xff\xff\xff\xffx.", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.", b"(" * 100_000 + b".", b"", b"}.",
        pickle.dumps({"a": 1})[:-3], b"cos\nsystem\n(S'touch /tmp/duq-ran'\ntR.",
    ],
)  # fmt: skip
def test_metadata_takes_no_memory_and_runs_nothing(pickled, tmp_path):
    file = _metadata(tmp_path / "metadata.pt", pickled)
    before = _peak()
    try:
        assert isinstance(read_metadata(file), dict)
    except CheckpointError as error:
        assert str(error).startswith(str(file))
    assert _peak() - before < 1 << 28 and not Path("/tmp/duq-ran").exists()


def test_metadata_that_expands(tmp_path):
    file = _metadata(tmp_path / "metadata.pt", bytes(100 << 20), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="data.pkl has 104,857,600 bytes, a config has a few thousand"):
        read_metadata(file)


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _npz(file: Path, header: dict, data: bytes) -> Path:
    text = repr(header).encode() + b"\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("state.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return file


@pytest.mark.parametrize("shape", [(10**12,), (1 << 62, 1 << 62), (-1,), (10**9, 0), (3, 10**9)])
def test_archives_that_say_they_are_huge(shape, tmp_path):
    file = _npz(tmp_path / "x.npz", {"descr": "<f4", "fortran_order": False, "shape": shape}, bytes(12))
    before = _peak()
    with pytest.raises(
        CalibrationError, match="x.npz: .*(bytes of data, and its header says|holds 1,?000,?000,?000 observ)"
    ):
        check_source(file)
    assert _peak() - before < 1 << 27


@pytest.mark.parametrize(
    "text, message",
    [
        ("delta = [1000000000]", "delta: is"), ("delta = [-1000000000, 1]", "delta: is"), ("delta = [0]", "delta: is"),
        ("delta = [nan]", "delta: is"), ("delta = [[]]", "delta: is"),
    ],
)  # fmt: skip
def test_robots_that_ask_for_memory(text, message, tmp_path):
    file = tmp_path / "robot.toml"
    file.write_text("\n".join(text if line.startswith("delta") else line for line in ROBOT.splitlines()))
    with pytest.raises(PlanError, match=f"robot.toml: .*{message}"):
        load_robot(str(file))


@pytest.mark.parametrize(
    "low, high", [("nan", "1.0"), ("0.0", "inf"), ("-1e300", "1e300"), ("1.0", "1.0000001"), ("0", "1e400")]
)
def test_conversions_between_numbers_that_no_joint_has(low, high, tmp_path):
    file = tmp_path / "robot.toml"
    convert = f'[[convert]]\nkind = "linear"\ndims = ["left_gripper"]\nlow = {low}\nhigh = {high}\n'
    names = load_robot("aloha")
    assert names is not None
    file.write_text(ROBOT + "\n" + convert.replace("left_gripper", names.action_names[6]))
    with pytest.raises(PlanError, match="robot.toml: .*(expected a number|too close)"):
        load_robot(str(file))


def test_deep_files(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "robot.toml").write_text(f"x = {deep}")
    with pytest.raises(PlanError, match="robot.toml: is nested too deep"):
        load_robot(str(tmp_path / "robot.toml"))
    KINDS["safetensors"].make(tmp_path)
    for text, message in (
        (deep, "nested too deep"),
        (f'{{"x": 1{"0" * 400}}}', "too large"),
        ('{"x": 1e999}', "too large"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\x00", b"no model", train_tokenizer()[:1000]])
def test_tokenizers(data, tmp_path):
    (tmp_path / "x.model").write_bytes(data)
    with pytest.raises(PlanError, match="tokenizer.model: .*--tokenizer FILE"):
        Tokenizer(data)
    with pytest.raises(CheckpointError, match="x.model: .*--tokenizer FILE"):
        checks.check_tokenizer(tmp_path / "x.model")


# --- packs that are kept ------------------------------------------------------------------------------------------------


def test_packs_are_kept_when_compiling_fails(tmp_path):
    KINDS["packs"].make(tmp_path)
    checkpoint = tiny_checkpoint()
    made, said = load_quantization(tmp_path / "packs", checkpoint), []

    def fail(given: Path | None, error: BaseException, quantization=made) -> None:
        with (
            pytest.raises(type(error)),
            checks.packs_kept(quantization, checkpoint, tmp_path / "p.plan", given, said.append),
        ):
            raise error

    fail(None, DuqError("no room"))
    fail(None, ZeroDivisionError())
    assert said == [
        f"note: the packs are kept in {tmp_path / name}; go on with --packs {tmp_path / name}"
        for name in ("p.plan.packs", "p.plan.packs-2")
    ]
    kept = load_quantization(tmp_path / "p.plan.packs", checkpoint)
    assert np.array_equal(kept.packs[NAME].weight_q, made.packs[NAME].weight_q)
    fail(tmp_path / "packs", DuqError("given ones are there already"))
    fail(None, KeyboardInterrupt())
    fail(None, DuqError("in float"), Quantization(Recipe()))
    assert len(said) == 2


def test_packs_that_cannot_be_kept(tmp_path, monkeypatch):
    KINDS["packs"].make(tmp_path)
    made, said = load_quantization(tmp_path / "packs", tiny_checkpoint()), []

    def refuse(*arguments):
        raise DuqError("the disk is full")

    monkeypatch.setattr(checks, "save_quantization", refuse)
    with pytest.raises(KeyError), checks.packs_kept(made, tiny_checkpoint(), tmp_path / "p.plan", None, said.append):
        raise KeyError
    assert said == ["note: the packs could not be kept: the disk is full"]
