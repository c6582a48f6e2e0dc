"""Signatures of plans: Ed25519, by the library `cryptography` (the extra `sign`).

The signature is of the bytes of `manifest.json`, which holds the SHA-256 of every other entry, so it covers the whole plan. It
lies beside the manifest as `manifest.sig`, a small JSON object: readers that know nothing of signatures pass over it, and so
does `unzip`. OpenSSL checks it as well (docs/plans.md).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from duq.runtime.errors import PlanError

ALGORITHM = "Ed25519"
KEY_BYTES, SIGNATURE_BYTES = 32, 64
_KEY_INFO = bytes.fromhex("302a300506032b6570032100")  # what stands before an Ed25519 key in DER (RFC 8410)


class SignatureFormatError(Exception):
    """`manifest.sig` is no signature."""


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key, 32 bytes."""

    data: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key in DER, in hex: `openssl pkey -pubin -in public.pem -outform DER | sha256sum`."""
        return hashlib.sha256(_KEY_INFO + self.data).hexdigest()


@dataclass(frozen=True)
class Signature:
    """Who signed, by their own account, and the signature, 64 bytes. Nothing is known before `is_valid`."""

    key: PublicKey
    data: bytes

    def to_json(self) -> str:
        return json.dumps({"algorithm": ALGORITHM, "public_key": self.key.data.hex(), "signature": self.data.hex()})

    @classmethod
    def from_json(cls, text: bytes) -> Signature:
        """Raises SignatureFormatError for anything that `to_json` does not make."""
        try:
            found = json.loads(text)
            key, data = bytes.fromhex(found["public_key"]), bytes.fromhex(found["signature"])
            if found["algorithm"] != ALGORITHM or len(key) != KEY_BYTES or len(data) != SIGNATURE_BYTES:
                raise ValueError(f"is no {ALGORITHM} signature")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SignatureFormatError(f"is no {ALGORITHM} signature") from error
        return cls(PublicKey(key), data)

    def is_valid(self, message: bytes) -> bool:
        """Whether its key signed the message. Raises PlanError without the library."""
        library = _library()
        try:
            library.Public.from_public_bytes(self.key.data).verify(self.data, message)
        except (library.Invalid, ValueError):  # the latter: 32 bytes that are no point of the curve
            return False
        return True


class Signer:
    """A private key that signs plans. Args: key: a file with an unencrypted Ed25519 private key, PEM.

    Raises PlanError where that is something else, or the library is missing.
    """

    def __init__(self, key: str | os.PathLike[str]):
        library = _library()
        try:
            found = library.load_private(_read(key), password=None)
        except TypeError as error:
            raise PlanError(f"{os.fspath(key)}: is encrypted; give a key without a passphrase") from error
        except library.unreadable as error:
            raise PlanError(f"{os.fspath(key)}: holds no private key in PEM; openssl genpkey makes one") from error
        if not isinstance(found, library.Private):
            raise PlanError(f"{os.fspath(key)}: is no {ALGORITHM} key; openssl genpkey -algorithm ed25519 makes one")
        self._key = found
        self.public = PublicKey(found.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> Signature:
        return Signature(self.public, self._key.sign(message))


def read_public_key(file: str | os.PathLike[str]) -> PublicKey:
    """The Ed25519 public key of a PEM file. Raises PlanError where that is something else, or the library is missing."""
    library = _library()
    try:
        found = library.load_public(_read(file))
    except library.unreadable as error:
        raise PlanError(
            f"{os.fspath(file)}: holds no public key in PEM; openssl pkey -pubout makes it of the private one"
        ) from error
    if not isinstance(found, library.Public):
        raise PlanError(f"{os.fspath(file)}: is no {ALGORITHM} key; plans are signed with {ALGORITHM}")
    return PublicKey(found.public_bytes_raw())


def check(path: Path, key: PublicKey, signature: Signature | None, message: bytes) -> None:
    """Raises PlanError unless the plan at `path`, whose manifest is `message`, is signed with `key`."""
    if signature is None:
        raise PlanError(f"{path}: is not signed; compile it with --sign, or leave the verify key out")
    if signature.key != key:
        raise PlanError(
            f"{path}: is signed with another key ({signature.key.fingerprint[:16]}) than the verify key "
            f"({key.fingerprint[:16]})"
        )
    if not signature.is_valid(message):
        raise PlanError(f"{path}: its signature does not match: it was altered after it was signed; do not run it")


def is_available() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec("cryptography") is not None


def _read(file: str | os.PathLike[str]) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(1 << 16)
    except (OSError, ValueError) as error:
        raise PlanError(f"{os.fspath(file)}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _library() -> SimpleNamespace:
    """What is used of `cryptography`, imported when it is needed: most plans do without."""
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise PlanError("signatures need cryptography: pip install 'duq-vla[sign]'") from error
    return SimpleNamespace(
        load_private=serialization.load_pem_private_key,
        load_public=serialization.load_pem_public_key,
        Private=ed25519.Ed25519PrivateKey,
        Public=ed25519.Ed25519PublicKey,
        Invalid=InvalidSignature,
        unreadable=(ValueError, UnsupportedAlgorithm),
    )
