"""Bad input at the command lines and at Policy: one clear error, exit code 2, before any long work, and nothing left."""

from __future__ import annotations

import re
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import duq.compiler.accuracy.compare
import duq.compiler.checkpoint.synthetic
import duq.compiler.cli
import duq.compiler.pipeline
import duq.runtime.plan
import duq.tools.compare
import duq.tools.make_checkpoint
from duq.compiler.commands import compile_main, quantize_main
from duq.plugins.errors import KernelError
from duq.runtime import Policy
from duq.runtime.errors import ObservationError, PlanError
from duq.runtime.inspect import main as inspect_main
from duq.runtime.observations import save_observations
from duq.runtime.plan import Plan, PlanWriter
from duq.runtime.serve_cli import main as serve_main
from tests.support.plans import manifest

W4A8 = "llm+expert-mlp"
UNWRITABLE = Path("/proc")  # also for root


def libero(**changes) -> dict:
    random = np.random.default_rng(0)
    observation = {
        "observation/image": random.integers(0, 256, (20, 30, 3), np.uint8),
        "observation/wrist_image": random.integers(0, 256, (20, 30, 3), np.uint8),
        "observation/state": random.normal(0, 0.3, 8).astype(np.float32),
        "prompt": "push the button",
    }
    return _changed(observation, {key.replace("__", "/"): value for key, value in changes.items()})


def bare(**changes) -> dict:
    random = np.random.default_rng(0)
    observation = {
        "image": {"base_0_rgb": random.integers(0, 256, (20, 30, 3), np.uint8)},
        "image_mask": {"base_0_rgb": True},
        "state": random.standard_normal(32).astype(np.float32),
        "tokenized_prompt": np.arange(2, 9),
        "tokenized_prompt_mask": np.ones(7, bool),
    }
    return _changed(observation, changes)


def _changed(observation: dict, changes: dict) -> dict:
    return {key: value for key, value in (observation | changes).items() if value is not None}


def with_nan(size: int) -> np.ndarray:
    return np.array([0, 0, np.nan] + [0] * (size - 3), np.float32)


OBSERVATIONS = {
    "state missing": (libero(observation__state=None), "observation lacks 'observation/state'; it has"),
    "camera missing": (libero(observation__image=None), "observation lacks 'observation/image'"),
    "prompt missing": (libero(prompt=None), "observation lacks 'prompt'"),
    "state of dates": (libero(observation__state=np.zeros(8, "M8[s]")), "observation/state: has dtype datetime64[s]"),
    "state too short": (libero(observation__state=np.zeros(7)), "observation/state: has shape [7], expected [8]"),
    "state NaN": (libero(observation__state=with_nan(8)), "observation/state: is not finite at index 2 (nan)"),
    "camera of 16 bits": (libero(observation__image=np.full((9, 9, 3), 256)), "has dtype int64 with values from 256 to"),
    "camera 0..255 in float": (
        libero(observation__wrist_image=np.full((9, 9, 3), 2.0)),
        "wrist_image: a floating-point image",
    ),
    "camera gray": (
        libero(observation__image=np.zeros((20, 30), np.uint8)),
        "observation/image: has shape [20, 30], expected",
    ),
    "bare, state missing": (bare(state=None), "observation lacks 'state'"),
    "bare, state of complex numbers": (bare(state=np.zeros(32, complex)), "state: has dtype complex128, expected"),
    "bare, state too wide": (bare(state=np.zeros(33, np.float32)), "state: has shape [33], expected"),
    "bare, state NaN": (bare(state=with_nan(32)), "state: is not finite at index 2 (nan)"),
    "bare, image of floats": (bare(image={"base_0_rgb": np.zeros((9, 9, 3), np.float32)}), "base_0_rgb: has dtype float32"),
    "bare, image CHW": (
        bare(image={"base_0_rgb": np.zeros((3, 9, 9), np.uint8)}),
        "image/base_0_rgb: has shape [3, 9, 9], ex",
    ),
    "bare, unknown slot": (
        bare(image={"front": np.zeros((9, 9, 3), np.uint8)}),
        "image: unknown slot 'front'; there are base",
    ),
    "bare, mask of no image": (bare(image_mask={"left_wrist_0_rgb": True}), "observation lacks 'left_wrist_0_rgb'"),
    "bare, no camera": (bare(image_mask={"base_0_rgb": False}), "has 0 cameras, the plan takes 1 to 3"),
    "bare, tokens of floats": (bare(tokenized_prompt=np.ones(7)), "tokenized_prompt: is float64, its mask bool; expected"),
    "bare, mask missing": (bare(tokenized_prompt_mask=None), "observation lacks 'tokenized_prompt_mask'"),
    "bare, tokens and mask differ": (bare(tokenized_prompt=np.arange(2, 8)), "has shape [6], mask [7], expected two of"),
    "bare, prompt too long": (
        bare(tokenized_prompt=np.ones(49, int), tokenized_prompt_mask=np.ones(49, bool)),
        "prompt: has 49 tokens, the policy takes at most 48; shorten it",
    ),
    "bare, token unknown": (bare(tokenized_prompt=np.full(7, 5000)), "token 5000 is not in the vocabulary of 512"),
}


@pytest.fixture(scope="module")
def compiled(tiny_plans):
    return tiny_plans("pi0", W4A8)


@pytest.fixture(autouse=True)
def no_long_work(compiled, monkeypatch):
    """Nothing here gets as far as what takes minutes at full size."""

    def began(*_, **__):
        raise AssertionError("long work began")

    for module, name in (
        (duq.compiler.pipeline, "export"),
        (duq.compiler.pipeline, "quantize"),
        (duq.compiler.accuracy.compare, "run_worker"),
        (duq.compiler.checkpoint.synthetic, "make_checkpoint"),
    ):
        monkeypatch.setattr(module, name, began)


@pytest.fixture
def refused(command_line):
    """([main, *arguments], *words): the program refuses these arguments in one line that has all the words in it."""

    def check(program, *words: str) -> None:
        result = command_line(*program)
        assert result.code == 2 and result.out == "", result
        _, _, message = result.err.partition("error: ")
        assert all(each in message for each in words), message
        assert "error: " not in message and "Traceback" not in result.err
        first, *listed = message.splitlines()
        assert len(first) > 20 and all(line.startswith("  ") for line in listed)

    return check


@pytest.fixture
def out(tmp_path):
    """An empty directory, which has to stay empty."""
    (tmp_path / "out").mkdir()
    yield tmp_path / "out"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def good(compiled, tmp_path):
    """checkpoint, plan, and the file of a good observation."""
    save_observations(tmp_path / "good.npz", [libero()])
    return *compiled, tmp_path / "good.npz"


@pytest.fixture
def programs(good, out):
    """Those that read a checkpoint and observations: (checkpoint, observations) -> [main, *arguments]."""
    quantizer = ["--robot", "libero", "--calibration"]
    return (
        lambda source, data: [compile_main, source, "--out", out / "engine.plan", *quantizer, data],
        lambda source, data: [quantize_main, source, "--out", out / "packs", *quantizer, data],
        lambda source, data: [
            duq.tools.compare.main,
            source,
            good[1],
            "--report",
            out / "report.html",
            "--observations",
            data,
        ],
    )


# --- checkpoints -----------------------------------------------------------------------------------------------------


def missing(path: Path) -> None:
    shutil.rmtree(path)


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"weights")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def cut_short(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def weights(change):
    def edit(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    return edit


EXPERT = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.weight"


def nan(tensors: dict) -> None:
    tensors[EXPERT][3, 4] = torch.nan


def narrow(tensors: dict) -> None:
    tensors[EXPERT] = tensors[EXPERT][:-8].clone()


def contradiction(path: Path) -> None:
    file = path / "config.json"
    file.write_text(file.read_text().replace('"action_dim": 32', '"action_dim": 24'))


def no_json(path: Path) -> None:
    (path / "config.json").write_text("{")


def no_statistics(path: Path) -> None:
    shutil.rmtree(path / "assets")


def no_tokenizer_model(path: Path) -> None:
    (path / "tokenizer.model").write_bytes(b"words")


CHECKPOINTS = {
    "missing": (missing, "bad does not exist: expected the directory that holds model.safetensors"),
    "a file": (a_file, "bad is a file: expected the directory"),
    "no weights": (no_weights, "bad is not a checkpoint: it has no model.safetensors"),
    "cut short": (cut_short, "bad/model.safetensors", "is cut short or damaged", "copy or download it again"),
    "tensor missing": (
        weights(lambda tensors: tensors.pop(EXPERT)),
        "bad: 1 tensors do not fit",
        "missing    expert.layers.1",
    ),
    "wrong dims": (weights(narrow), "bad: 1 tensors do not fit", "expert.layers.1.mlp.up_proj.weight", "expected ["),
    "NaN": (weights(nan), "bad: 1 tensors hold NaN", "expert.layers.1.mlp.up_proj.weight: 1 of"),
    "contradiction": (contradiction, "bad: config.json contradicts", "action_dim: action_dim 24, but the tensors have 32"),
    "config no JSON": (no_json, "bad/config.json: cannot be read"),
    "no tokenizer model": (
        no_tokenizer_model,
        "tokenizer.model: is not a SentencePiece model; give PaliGemma's SentencePiece model with --tokenizer",
    ),
    "no statistics": (no_statistics, "bad has no normalization statistics", "--without-norm-stats"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name, good, programs, refused, tmp_path):
    edit, *words = CHECKPOINTS[name]
    shutil.copytree(good[0], tmp_path / "bad")
    edit(tmp_path / "bad")
    if name == "no statistics":  # only a plan needs them
        programs = programs[:1]
    if name == "no tokenizer model":  # a comparison takes the plan's
        programs = programs[:2]
    for program in programs:
        main, *arguments = program(tmp_path / "bad", good[2])
        any_checkpoint = ["--any-checkpoint"] if main is duq.tools.compare.main else []
        refused([main, *arguments, *any_checkpoint], *words)


# --- observations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observation_for_policy(name, compiled):
    observation, words = OBSERVATIONS[name]
    policy = Policy(compiled.plan, threads=1, verify=False)
    with pytest.raises(ObservationError) as error:
        policy.infer(observation)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observation_on_disk(name, good, programs, refused, tmp_path):
    observation, words = OBSERVATIONS[name]
    (tmp_path / "set").mkdir()
    save_observations(tmp_path / "set" / "0.npz", [libero()])
    save_observations(tmp_path / "set" / "1.npz", [observation])
    for program in programs:
        refused(program(good[0], tmp_path / "set"), "observation 1: ", words)


def not_a_zip(path: Path) -> None:
    path.write_bytes(b"observations")


def pickles(path: Path) -> None:
    np.savez(path, state=np.array([{}], dtype=object))


def of_unequal_lengths(path: Path) -> None:
    np.savez(path, state=np.zeros((3, 8), np.float32), prompt=np.array(["a", "b"]))


FILES = {
    "missing": (lambda path: None, "No such file"),
    "empty directory": (Path.mkdir, "holds no .npz file of observations"),
    "not a zip": (not_a_zip, "is not an .npz file of plain arrays"),
    "pickles": (pickles, "is not an .npz file of plain arrays"),
    "of unequal lengths": (of_unequal_lengths, "prompt holds 2 observations and state 3, must be equal"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_of_observations(name, good, programs, refused, tmp_path):
    make, words = FILES[name]
    make(tmp_path / "bad.npz")
    for program in programs:
        refused(program(good[0], tmp_path / "bad.npz"), "bad.npz: ", words)


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan_refused(good, refused, out):
    """(words, path): the plan is refused by everything that opens one."""

    def check(words: str, path: Path) -> None:
        refused([inspect_main, path], str(path), words)
        refused([duq.tools.compare.main, good[0], path, "--report", out / "report.html"], str(path), words)
        with pytest.raises(PlanError) as error:
            Policy(path)
        assert words in str(error.value) and str(path) in str(error.value)

    return check


def test_a_flipped_byte_in_any_entry(good, refused, plan_refused, tmp_path):
    """In the first, middle or last byte. The first entry of a kind is tried on every program, the others on Plan."""
    path = tmp_path / "engine.plan"
    shutil.copy(good[1], path)
    entries, random = Plan(path).manifest["entries"], np.random.default_rng(0)
    first = {name.split("/")[0]: name for name in reversed(entries)}
    assert set(first) == {"graph", "weights", "tokenizer.model", "value_basis"}
    for name, entry in entries.items():
        position = entry["offset"] + int(random.choice([0, entry["bytes"] // 2, entry["bytes"] - 1]))
        with flipped(path, position, bit=int(random.integers(8))):
            words = f"entry {name} is damaged (its SHA-256 does not match); copy or compile the plan again"
            if name in first.values():
                plan_refused(words, path)
            with pytest.raises(PlanError, match=re.escape(words)):
                Plan(path)
    Plan(path)


@contextmanager
def flipped(path: Path, position: int, bit: int):
    """The file, within the block, has one bit turned over."""

    def flip() -> None:
        with open(path, "r+b") as file:
            file.seek(position)
            byte = file.read(1)[0] ^ 1 << bit
            file.seek(position)
            file.write(bytes([byte]))

    flip()
    yield
    flip()


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_a_plan_cut_short(kept, good, plan_refused, tmp_path):
    whole = good[1].read_bytes()
    (tmp_path / "engine.plan").write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    plan_refused("engine.plan: ", tmp_path / "engine.plan")


def test_a_plan_of_a_newer_format(plan_refused, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, PlanWriter(tmp_path / "engine.plan") as plan:
        patch.setattr(duq.runtime.plan, "FORMAT_VERSION", duq.runtime.plan.FORMAT_VERSION + 1)
        plan.finish(manifest())
    plan_refused("has format version 3, this runtime reads 2; upgrade duq", tmp_path / "engine.plan")


def test_what_is_no_plan(plan_refused, tmp_path):
    plan_refused("No such file", tmp_path / "nowhere.plan")
    plan_refused("Is a directory", tmp_path)
    (tmp_path / "text.plan").write_text("a plan")
    plan_refused("not an engine plan", tmp_path / "text.plan")
    with zipfile.ZipFile(tmp_path / "zip.plan", "w") as archive:
        archive.writestr("readme.txt", "a plan")
    plan_refused("not an engine plan", tmp_path / "zip.plan")


# --- options ---------------------------------------------------------------------------------------------------------

QUANTIZER = {
    "preset": (
        ["--quant=llm+expert"],
        "'llm+expert' is neither a preset nor a .yaml or .toml recipe file; did you mean llm",
    ),
    "recipe file missing": (["--quant=missing.yaml"], "'missing.yaml' is neither a preset nor"),
    "weight bits": (["--weight-bits=3"], "unknown weight_bits 3"),
    "layer bits": (["--layer-bits=layers.0"], "'layers.0' is not of the form PATTERN:BITS"),
    "block size": (["--block-size=7"], "block_size is 7"),
    "pattern": (["--include=["], "is not a regular expression"),
    "robot": (["--robot=kuka"], "kuka"),
    "nothing selected": (["--include=nothing"], "the recipe selects none of the policy's linears (scope '', include 'no"),
    "scope of nothing": (["--scope=mlp", "--quant=all"], "selects none of the policy's linears (scope 'mlp'"),
    "bits for nothing": (["--layer-bits=layer.0:8"], "layer_bits layer.0:8 is for none of the policy's linears"),
    "damping": (["--damping=nan"], "damping is nan; it must be positive"),
    "packs missing": (["--packs=nowhere"], "nowhere"),
    "tokenizer missing": (["--tokenizer=nowhere.model"], "--tokenizer nowhere.model: no such file"),
    "asset id": (["--asset-id=nobody"], 'no statistics for asset id "nobody"'),
}


@pytest.mark.parametrize("name", QUANTIZER)
def test_options_of_the_quantizer(name, good, programs, refused):
    options, words = QUANTIZER[name]
    for program in programs[:2]:
        refused([*program(good[0], good[2]), *options], words)


def test_recipe_files(good, programs, refused, tmp_path):
    for text, words in (
        ("preset: lm", "unknown preset in"),
        ("wieght_bits: 4", "unknown recipe key 'wieght_bits'; did you mean weight_bits"),
        ("layer_bits: 3", "recipe key layer_bits is 3; expected a list of PATTERN:BITS"),
        ("layer_bits: [3]", "recipe key layer_bits is [3]; expected a list of PATTERN:BITS"),
        ("scheme: [1]", "unknown scheme [1]; expected one of"),
        ("scheme: {a: 1}", "unknown scheme {'a': 1}; expected one of"),
        ("preset: [1]", "unknown preset in "),
        ("weight_bits: .inf", "recipe key weight_bits is inf; expected int"),
        ("weight_bits: !!int abc", "does not parse: invalid literal"),
        ("[" * 3000, "does not parse: RecursionError: maximum recursion depth"),
        ("damping: .nan", "damping is nan; it must be positive"),
        ("weight_bits: four", "recipe key weight_bits is 'four'; expected int"),
        ("[", "does not parse"),
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        for program in programs[:2]:
            refused([*program(good[0], good[2]), "--quant", tmp_path / "recipe.yaml"], words)


def test_damaged_packs(good, out, refused, tmp_path):
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "recipe.json").write_text("{")
    program = [compile_main, good[0], "--packs", tmp_path / "packs", "--out", out / "engine.plan"]
    refused(program, f"{tmp_path / 'packs' / 'recipe.json'} is not readable")


def test_options_of_the_compiler(good, out, refused):
    compiling = [compile_main, good[0], "--out", out / "engine.plan"]
    refused(compiling, "give observations of the robot with --calibration")
    refused([*compiling, "--target", "tpu"], "--target tpu: unknown, this version compiles for cpu")
    refused([*compiling, "--scheme", "reference"], "--scheme reference is a fake quantization for studies")
    refused([quantize_main, good[0], "--out", out / "packs"], "--calibration is missing")


def test_devices(good, out, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for program in (
        [compile_main, good[0], "--out", out / "engine.plan"],
        [quantize_main, good[0], "--out", out / "packs"],
    ):
        quantizing = [*program, "--calibration", good[2], "--device"]
        refused([*quantizing, "tpu"], "--device tpu: unknown, cpu or cuda")
        refused([*quantizing, "cuda"], "--device cuda: PyTorch finds no GPU that it can use; leave --device out")


def test_architectures(good, out, refused, monkeypatch):
    def no_driver() -> int:
        raise KernelError("no usable NVIDIA driver on this machine")

    monkeypatch.setattr(duq.compiler.cli, "open_device", no_driver)
    compiling = [compile_main, good[0], "--quant", "none", "--out", out / "engine.plan", "--target"]
    refused([*compiling, "cuda", "--sm", 75], "--sm 75: --target cuda compiles for 80, 86, 87, 89, 90")
    refused([*compiling, "cuda", "--sm", 90, "--sm", 75], "--sm 75: --target cuda compiles for 80, 86, 87, 89, 90")
    refused([*compiling, "cpu", "--sm", 90], "--sm 90: --target cpu runs on no GPU; leave --sm out")
    refused(
        [*compiling, "cuda"],
        "--target cuda needs --sm, one of 80, 86, 87, 89, 90",
        "no GPU to ask (no usable NVIDIA driver",
    )


def test_values_out_of_range(good, out, command_line):
    """These are refused by the parser of the options, in its own words."""
    for main, *arguments in (
        (compile_main, good[0], "--out", out / "engine.plan", "--num-steps", 0),
        (compile_main, good[0], "--out", out / "engine.plan", "--cameras", 4),
        (compile_main, good[0]),
        (quantize_main, good[0], "--nonsense", "--out", out / "packs"),
        (duq.tools.compare.main, good[0], good[1], "--threads", 0),
        (duq.tools.make_checkpoint.main, "--out", out / "checkpoint", "--variant", "huge"),
        (duq.tools.make_checkpoint.main, "--out", out / "checkpoint", "--depth", 0),
    ):
        result = command_line(main, *arguments)
        assert result.code == 2 and result.out == "" and "Traceback" not in result.err


# --- where results go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a directory", "in no directory", "unwritable"])
def test_output_file(where, good, refused, tmp_path):
    path, words = {
        "a directory": (tmp_path, "must be a file in an existing directory"),
        "in no directory": (tmp_path / "nowhere" / "result", "must be a file in an existing directory"),
        "unwritable": (UNWRITABLE / "result", "nothing can be written to /proc"),
    }[where]
    before = sorted(tmp_path.iterdir())
    refused([compile_main, good[0], "--calibration", good[2], "--out", path], "--out", words)
    refused([duq.tools.compare.main, good[0], good[1], "--observations", good[2], "--report", path], "--report", words)
    assert sorted(tmp_path.iterdir()) == before


def test_output_directory(good, out, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    quantizing = [quantize_main, good[0], "--calibration", good[2], "--out"]
    compiling = [compile_main, good[0], "--calibration", good[2], "--out", out / "engine.plan", "--keep-phases"]
    for program in (quantizing, compiling, [duq.tools.make_checkpoint.main, "--out"]):
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            refused([*program, path], f"{program[-1]} {path}: {tmp_path / 'file'} is a file; name a directory")
        refused([*program, UNWRITABLE / "result"], f"{program[-1]}: nothing can be written to /proc")
    refused([*quantizing, good[0]], f"{good[0]} exists and is not a directory of packs; choose another --out")
    assert (tmp_path / "file").read_text() == "mine"


def test_paths_that_are_not_utf_8(good, out, refused, tmp_path):
    """safetensors takes none, and what it says about it does not name the fix. A plan may have one."""
    odd = tmp_path / "\udcff"
    shutil.copytree(good[0], odd)
    refused([compile_main, odd, "--quant", "none", "--out", out / "engine.plan"], "its path is not UTF-8", "rename it")
    shutil.copy(good[1], odd / "engine.plan")
    Policy(odd / "engine.plan").warmup()


def test_options_of_another_target(good, out, refused):
    program = [compile_main, good[0], "--quant", "none", "--out", out / "engine.plan"]
    refused([*program, "--loop", "unrolled"], "--loop unrolled: is for --target tensorrt; leave it out for cpu")
    refused([*program, "--float-type", "fp15"], "--float-type fp15: is for --target tensorrt; leave it out for cpu")
    refused([*program, "--no-timing"], "--no-timing: is for --target cuda; leave it out for cpu")
    refused([*program, "--target", "tensorrt", "--timing"], "--timing: is for --target cuda; leave it out for tensorrt")
    refused([*program, "--target", "cuda", "--loop", "graph"], "--loop graph: is for --target tensorrt")


@pytest.mark.parametrize("host", ["\udcff", "é\udcff", "a" * 64, "no such host"])
def test_hosts_that_cannot_be(refused, host):
    refused([serve_main, "missing.plan", "--host", host], "cannot be listened on")


def test_packs_that_are_a_file(good, out, refused):
    program = [compile_main, good[0], "--packs", good[2], "--out", out / "engine.plan"]
    refused(program, f"--packs {good[2]}: is not a directory of packs")
