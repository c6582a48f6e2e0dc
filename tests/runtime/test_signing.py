"""Signed plans: what a verify key accepts and refuses, checked against OpenSSL's own implementation."""

import importlib.util
import json
import subprocess
import zipfile

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import duq.runtime.plan
from duq.runtime import signing
from duq.runtime.errors import PlanError
from duq.runtime.inspect import main
from duq.runtime.plan import MANIFEST, SIGNATURE, Plan, PlanWriter
from duq.runtime.signing import Signer, read_public_key
from tests.support.plans import manifest, write_plan

ENTRIES = {"graph/step.onnx": b"step" * 20, "weights/w": np.arange(50, dtype=np.float32)}
PEM, PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(duq.runtime.plan, "_TICK_NS", 0)


def write_keys(folder, name, key=None):
    key = key or ed25519.Ed25519PrivateKey.generate()
    (folder / f"{name}.pem").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub.pem").write_bytes(public)
    return folder / f"{name}.pem", folder / f"{name}.pub.pem"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return write_keys(folder, "own"), write_keys(folder, "other")


@pytest.fixture(scope="module")
def signed(tmp_path_factory, keys):
    path = tmp_path_factory.mktemp("signed") / "engine.plan"
    write_plan(path, ENTRIES, Signer(keys[0][0]))
    return path


def test_a_signed_plan_opens_with_its_key_and_without(signed, keys):
    (_, public), (_, other) = keys
    for plan in (Plan(signed, verify_key=public), Plan(signed, verify_key=str(public)), Plan(signed)):
        assert plan.signature.key.fingerprint == read_public_key(public).fingerprint and plan.is_signed()
    with pytest.raises(PlanError, match="engine.plan: is signed with another key .* than the verify key"):
        Plan(signed, verify_key=other)


def test_openssl_agrees(signed, keys, tmp_path):
    """The signature is of manifest.json as unzip has it; the fingerprint is that of the key in DER."""
    (_, public), (_, other) = keys
    with zipfile.ZipFile(signed) as archive:
        (tmp_path / "manifest").write_bytes(archive.read(MANIFEST))
        (tmp_path / "signature").write_bytes(bytes.fromhex(json.loads(archive.read(SIGNATURE))["signature"]))

    def verifies(key) -> bool:
        command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", key, "-rawin", "-in", tmp_path / "manifest",
                   "-sigfile", tmp_path / "signature"]  # fmt: skip
        return subprocess.run(command, capture_output=True).returncode == 0

    assert verifies(public) and not verifies(other)
    der = subprocess.run(["openssl", "pkey", "-pubin", "-in", public, "-outform", "DER"], capture_output=True, check=True)
    digest = subprocess.run(["sha256sum"], input=der.stdout, capture_output=True, check=True).stdout.decode().split()[0]
    assert read_public_key(public).fingerprint == digest


def test_an_unsigned_plan_is_refused(tmp_path, keys):
    write_plan(tmp_path / "engine.plan", ENTRIES)
    with pytest.raises(PlanError, match="engine.plan: is not signed"):
        Plan(tmp_path / "engine.plan", verify_key=keys[0][1])
    assert Plan(tmp_path / "engine.plan").is_signed() is False


def test_a_signature_without_hashes_is_refused(signed, keys):
    with pytest.raises(PlanError, match="leave verify=False out, or the key"):
        Plan(signed, verify=False, verify_key=keys[0][1])


def rewritten(signed, path, change, signature=None):
    """The same entries with another manifest, and this signature or that of the old one: a plan that is whole, and altered."""
    old = Plan(signed)
    data = {key: value for key, value in old.manifest.items() if key not in ("entries", "format_version")}

    class Forger:
        def sign(self, text):
            return signature or old.signature

    with PlanWriter(path) as plan:
        for name in old.names:
            plan.write(name, bytes(old.read(name)))
        plan.finish(data | change, Forger())


@pytest.mark.parametrize("change", [{"num_steps": 9}, {"notes": ["x"]}, {"cameras": 2}])
def test_another_manifest_under_the_signature_is_refused(signed, keys, tmp_path, change):
    rewritten(signed, tmp_path / "engine.plan", change)
    with pytest.raises(PlanError, match="its signature does not match: it was altered"):
        Plan(tmp_path / "engine.plan", verify_key=keys[0][1])
    with pytest.raises(PlanError, match="its signature does not match"):
        Plan(tmp_path / "engine.plan").is_signed()


def test_a_forger_who_names_the_right_key_is_refused(signed, keys, tmp_path):
    """Signed with the other key, under the name of the own one."""
    (_, public), (other, _) = keys
    with zipfile.ZipFile(signed) as archive:
        forged = signing.Signature(read_public_key(public), Signer(other).sign(archive.read(MANIFEST)).data)
    rewritten(signed, tmp_path / "engine.plan", {}, forged)
    with pytest.raises(PlanError, match="its signature does not match"):
        Plan(tmp_path / "engine.plan", verify_key=public)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_harmless_or_refused(tmp_path, signed, keys, data):
    original, whole = signed.read_bytes(), Plan(signed)
    damaged = bytearray(original)
    damaged[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "p").write_bytes(damaged)
    try:
        plan = Plan(tmp_path / "p", verify_key=keys[0][1])
    except PlanError:
        return
    assert plan.manifest == whole.manifest and all(plan.read(name) == whole.read(name) for name in whole.names)


def test_a_signed_plan_is_a_plain_zip_of_the_same_entries(signed):
    """What a reader that knows nothing of signatures reads: the manifest, and what it names."""
    with zipfile.ZipFile(signed) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [*ENTRIES, MANIFEST, SIGNATURE]
        assert list(json.loads(archive.read(MANIFEST))["entries"]) == list(ENTRIES)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"[" * 100_000, b'{"algorithm": "Ed25519", "public_key": 1}', b"\xff"])
def test_what_is_no_signature(text, tmp_path):
    class Scribbler:
        def sign(self, message):
            return self

        def to_json(self):
            return text

    with PlanWriter(tmp_path / "engine.plan") as plan:
        plan.finish(manifest(), Scribbler())
    with pytest.raises(PlanError, match="manifest.sig: is no Ed25519 signature"):
        Plan(tmp_path / "engine.plan")


def test_keys_that_cannot_be_used(tmp_path, keys):
    private, public = keys[0]
    (tmp_path / "text").write_text("a key")
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(
        PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )
    (tmp_path / "locked").write_bytes(locked)
    curve = write_keys(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    for make, file, says in (
        (Signer, tmp_path / "none", "cannot be read .No such file"),
        (Signer, tmp_path / "text", "holds no private key in PEM"),
        (Signer, tmp_path / "locked", "is encrypted; give a key without a passphrase"),
        (Signer, public, "holds no private key in PEM"),
        (Signer, curve[0], "is no Ed25519 key"),
        (Signer, tmp_path, "cannot be read .Is a directory"),
        (read_public_key, tmp_path / "none", "cannot be read .No such file"),
        (read_public_key, private, "holds no public key in PEM"),
        (read_public_key, curve[1], "is no Ed25519 key"),
    ):
        with pytest.raises(PlanError, match=f"{file.name}: {says}"):
            make(file)


def test_without_the_library_the_extra_is_named(signed, keys, monkeypatch, command_line):
    find = importlib.util.find_spec
    monkeypatch.setitem(__import__("sys").modules, "cryptography.exceptions", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cryptography" else find(name))
    for open_plan in (lambda: Plan(signed, verify_key=keys[0][1]), lambda: Signer(keys[0][0])):
        with pytest.raises(PlanError, match=r"signatures need cryptography: pip install 'duq-vla\[sign\]'"):
            open_plan()
    assert Plan(signed).is_signed() is None  # opens all the same
    assert "not checked: pip install 'duq-vla[sign]'" in command_line(main, signed).out


def test_inspect_says_who_signed(signed, keys, tmp_path, command_line):
    (_, public), (_, other) = keys
    fingerprint = read_public_key(public).fingerprint
    assert f"signed with the key {fingerprint}; the signature matches" in command_line(main, signed).out
    assert f"{fingerprint}, which is that of {public}" in command_line(main, signed, "--verify-key", public).out
    assert json.loads(command_line(main, signed, "--json").out)["signature"] == {"key": fingerprint, "verified": True}
    ran = command_line(main, signed, "--verify-key", other)
    assert ran.code == 2 and ran.out == "" and "another key" in ran.err and ran.err.count("\n") == 1
    rewritten(signed, tmp_path / "altered.plan", {"num_steps": 9})
    ran = command_line(main, tmp_path / "altered.plan")
    assert ran.code == 2 and ran.out == "" and "does not match" in ran.err
