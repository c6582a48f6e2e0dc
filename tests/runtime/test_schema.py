"""The schema of the manifest: what is accepted, how an error reads, and that any edit ends in an error or a plan that is one."""

import json

import pytest
from hypothesis import HealthCheck, given, settings

import duq.runtime.plan
from duq.runtime import schema
from duq.runtime.errors import PlanError
from duq.runtime.inspect import main
from duq.runtime.plan import Plan, PlanWriter
from duq.runtime.preprocess import MODES
from tests.support.json_edits import edited, places
from tests.support.plans import full_manifest, manifest, write_cuda_plan


def refusal(data: dict) -> str:
    with pytest.raises(PlanError) as error:
        schema.parse_manifest(json.dumps(data))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_a_full_manifest_is_accepted():
    assert schema.parse_manifest(json.dumps(full_manifest())) == full_manifest()


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("num_steps", 0, "num_steps is 0; it should be greater than or equal to 1"),
        ("num_steps", 10**9, "num_steps is 1000000000; it should be less than or equal to 1000"),
        ("num_steps", "4", "num_steps is '4'; it should be a valid integer"),
        ("num_steps", True, "num_steps is True; it should be a valid integer"),
        ("num_steps", 10**400, "num_steps is 1000"),
        ("norm_stats", {}, "norm_stats.state is missing"),
        ("norm_stats.state.std", [float("nan")] * 14, "norm_stats.state.std.0 is nan, expected a finite number"),
        ("norm_stats.state.std", [-1.0] * 14, "norm_stats.state.std.0 is -1.0; it should be greater than or equal to 0"),
        ("norm_stats.state.mean", [0.0], "norm_stats.state: the statistics differ in length: mean 1, std 14"),
        ("norm_stats.actions.q01", [2.0] * 14, "norm_stats.actions: q01 is above q99 at index 0"),
        ("norm_stats.rule", "lerobot", "norm_stats: state.mode is None, which does not go with the rule lerobot"),
        ("entries.graph/prefix.onnx.sha256", "xyz", "entries.graph/prefix.onnx.sha256 is 'xyz'; string should match"),
        ("entries.graph/prefix.onnx.offset", -1, "entries.graph/prefix.onnx.offset is -1; it should be greater than"),
        ("entries.graph/prefix.onnx", 5, "entries.graph/prefix.onnx is 5; it should be an object"),
        ("target", "tpu", "target is 'tpu'; it should be 'cpu', 'cuda' or 'tensorrt'"),
        ("target", "cuda", "sm is empty; a cuda plan is made for one or more"),
        ("robot", "kuka", "robot is 'kuka', but robot_description.name is 'aloha'"),
        ("robot_description", None, None),
        ("robot_description.cameras", [], "robot_description.cameras is a list of 0; list should have at least 1 item"),
        ("model.vision.patch_size", 13, "model.vision: image_size is 28, which is no multiple of patch_size 13"),
        ("model.rotary", "round", "model.rotary is 'round'; it should be 'exact' or 'bfloat16'"),
        ("model.action_horizon", 10**9, "model.action_horizon is 1000000000; it should be less than or equal to 1000"),
        ("checkpoint.fingerprint", "", "checkpoint.fingerprint is missing"),
        ("quantization.linears.llm.layers.0.mlp.up_proj", 1, "quantization.linears.llm.layers.0.mlp.up_proj is 1; it should"),
        ("graphs.prefix", [], "graphs.prefix is a list of 0; it should be an object"),
        ("transforms.pad_state_in_prompt", -1, "transforms.pad_state_in_prompt: it is -1, expected a bool"),
        ("batch", 8, "batch is unknown to this duq; upgrade it"),
        ("notes", ["\x1b[2J"], r"notes.0 holds '\x1b[2J', which is no text"),
    ],
)  # fmt: skip
def test_an_error_names_field_value_and_what_is_expected(place, value, says):
    data = full_manifest()
    (keys,) = [each for each in places(data) if ".".join(map(str, each)) == place] or [tuple(place.split("."))]
    holder = data
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    if says is None:
        schema.parse_manifest(json.dumps(data))
    else:
        assert refusal(data).startswith(says)


@pytest.mark.parametrize("sqnr", [None, float("nan"), 20])
@pytest.mark.parametrize("bits", [None, 0, 8])
def test_linears_of_float_activations_or_of_packs_that_nobody_measured(sqnr, bits):
    data = full_manifest()
    data["quantization"]["linears"]["llm.layers.0.mlp.up_proj"] |= {"sqnr_db": sqnr, "activation_bits": bits}
    schema.parse_manifest(json.dumps(data))


@pytest.mark.parametrize("key", ["robot", "num_steps", "cameras", "model", "norm_stats", "checkpoint", "target", "entries"])
def test_what_has_to_be_there(key):
    data = full_manifest()
    del data[key]
    assert refusal(data) == f"{key} is missing"


def test_text_that_is_no_manifest():
    for text, says in (
        ("[" * 100_000 + "]" * 100_000, "is nested deeper than"),
        ('{"notes": ' + "[" * 100 + "]" * 100 + "}", "notes.0.0 is nested deeper than"),
        ("[]", "is a list of 0, expected an object"),
        ("{", "is not JSON"),
        (b"\xff", "is not JSON"),
        ('{"num_steps": 1' + "0" * 10_000 + "}", "is not JSON"),
        ('{"num_steps": 1e999}', "num_steps is inf, expected a finite number"),
    ):
        with pytest.raises(PlanError) as error:
            schema.parse_manifest(text)
        assert str(error.value).startswith(says), text[:20]


def test_modes_are_the_preprocessor_s():
    wanted = schema.Statistics.model_fields["mode"].annotation
    assert set(MODES) | {None} == {each for part in wanted.__args__ for each in getattr(part, "__args__", (None,))}
    assert {name for names in MODES.values() for name in names} <= set(schema.Statistics.model_fields)


def test_a_writer_publishes_no_manifest_that_a_reader_refuses(tmp_path):
    with pytest.raises(PlanError, match="engine.plan: cannot be written: manifest.json: num_steps is 0; it should"):
        with PlanWriter(tmp_path / "engine.plan") as plan:
            plan.finish(manifest(num_steps=0))
    assert not list(tmp_path.iterdir())


def write_unchecked(path, entries, data, monkeypatch):
    """A plan of whatever manifest: what an editor of the file, or a bug elsewhere, may leave."""
    with monkeypatch.context() as patch, PlanWriter(path) as plan:
        patch.setattr(schema, "parse_manifest", lambda text: None)
        for name, content in entries.items():
            plan.write(name, content)
        plan.finish(data)


@given(data=edited({key: value for key, value in full_manifest().items() if key not in ("entries", "format_version")}))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_edit_of_a_manifest_is_an_error_or_a_correct_print(tmp_path, monkeypatch, command_line, data):
    """Of opening the plan, and of duq-inspect, in text and in JSON."""
    monkeypatch.setattr(duq.runtime.plan, "_TICK_NS", 0)
    path = tmp_path / "engine.plan"
    write_unchecked(path, {"graph/prefix.onnx": b"onnx"}, data, monkeypatch)
    try:
        expected = Plan(path).manifest
    except PlanError as error:
        ran = command_line(main, path)
        assert (ran.code, ran.out, ran.err) == (2, "", f"error: {error}\n") and str(path) in ran.err
        return
    ran = command_line(main, path, "--all")
    if ran.code:  # a robot's description, which runtime/robots checks
        assert ran.code == 2 and ran.out == "" and ran.err.startswith("error: robot: ") and ran.err.count("\n") == 1
    found = json.loads(command_line(main, path, "--json").out)
    assert {key: found[key] for key in expected} == expected


@given(data=edited(json.loads(json.dumps(manifest(target="cuda", sm=[90], graphs={"ptx": [90], "sm90": {"gpu": "H100"}})))))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_edit_of_a_cuda_manifest(tmp_path, monkeypatch, command_line, data):
    monkeypatch.setattr(duq.runtime.plan, "_TICK_NS", 0)
    write_cuda_plan(tmp_path / "whole.plan")
    whole = Plan(tmp_path / "whole.plan")
    write_unchecked(tmp_path / "engine.plan", {name: bytes(whole.read(name)) for name in whole.names}, data, monkeypatch)
    ran = command_line(main, tmp_path / "engine.plan", "--all")
    assert (ran.code == 0 and "norm" in ran.out) or (ran.code == 2 and ran.out == "" and ran.err.count("\n") == 1)
