"""duq-compile --sign, and who opens the plan: Policy, duq-serve and duq-inspect with a verify key. Settings no plan can hold."""

import subprocess
from dataclasses import replace

import pytest
from rich.progress import Progress

import duq.compiler.pipeline
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.cli import compile_main
from duq.compiler.pipeline import compile_policy
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.targets import Options
from duq.runtime import Policy
from duq.runtime.errors import PlanError
from duq.runtime.inspect import main as inspect_main
from duq.runtime.plan import Plan
from duq.runtime.serve_cli import main as serve_main


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Made by the commands of docs/plans.md."""
    folder = tmp_path_factory.mktemp("keys")
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", "private.pem"], cwd=folder, check=True)
    subprocess.run(["openssl", "pkey", "-in", "private.pem", "-pubout", "-out", "public.pem"], cwd=folder, check=True)
    return folder / "private.pem", folder / "public.pem"


def compile_arguments(tiny_plans, out, *more):
    source = tiny_plans("pi0", "none").checkpoint
    return source, "--robot", "libero", "--quant", "none", "--num-steps", "4", "--out", out, *more


def test_sign_and_verify(tiny_plans, keys, command_line, tmp_path):
    private, public = keys
    out, unsigned = tmp_path / "engine.plan", tiny_plans("pi0", "none").plan
    ran = command_line(compile_main, *compile_arguments(tiny_plans, out, "--sign", private))
    fingerprint = Plan(out, verify_key=public).signature.key.fingerprint
    assert ran.code == 0 and f"signed with the key {fingerprint}" in ran.out
    assert Policy(out, verify_key=public).metadata["robot"] == "libero"
    assert f"{fingerprint}, which is that of" in command_line(inspect_main, out, "--verify-key", public).out
    with pytest.raises(PlanError, match="is not signed"):
        Policy(unsigned, verify_key=public)
    ran = command_line(serve_main, unsigned, "--port", "0", "--verify-key", public)
    assert ran.code == 2 and "is not signed" in ran.err


@pytest.mark.parametrize(("key", "says"), [("public.pem", "holds no private key"), ("none.pem", "No such file")])
def test_a_bad_key_is_refused_before_the_work(key, says, tiny_plans, keys, command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(duq.compiler.pipeline, "export", None)
    ran = command_line(compile_main, *compile_arguments(tiny_plans, tmp_path / "x.plan", "--sign", keys[0].with_name(key)))
    assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_no_plan_can_hold_is_refused_before_the_work(tiny_plans, tmp_path, monkeypatch):
    monkeypatch.setattr(duq.compiler.pipeline, "export", None)
    source = load_checkpoint(tiny_plans("pi0", "none").checkpoint)
    large = replace(source, config=replace(source.config, action_horizon=10**9))
    with pytest.raises(PlanError, match="cannot become a plan: model.action_horizon is 1000000000; it should be less than"):
        with Progress(disable=True) as progress:
            quantization = Quantization(load_recipe("none", environment={}))
            compile_policy(large, quantization, tmp_path / "engine.plan", Options(robot="libero"), progress)
    assert not list(tmp_path.iterdir())
