"""Where a checkpoint is: a folder, or a place it has to be brought from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duq.compiler.errors import CheckpointError

# What a policy consists of, at the top of its folder; optimizer states and the other checkpoints of a run are not brought.
WANTED = ("*.safetensors", "*.json", "*.model", "metadata.pt", "assets/*", "params/*")
UNWANTED = ("*/*.safetensors", "train_state/*", "optimizer*", "scheduler*", "rng_state*")


@dataclass(frozen=True)
class HubLocation:
    """A folder of a model repository on the Hugging Face Hub."""

    repository: str  # "owner/name"
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{revision}" + (f"/{self.subfolder}" if self.subfolder else "")


def parse_location(text: str | Path) -> Path | HubLocation:
    """A folder's path, or "hf://owner/name[@revision][/subfolder]" (also as `Path` leaves it: with one slash).

    Raises CheckpointError for a malformed hf:// and, with the command that downloads it, for places that duq does not read.
    """
    scheme = re.match(r"([a-z][a-z0-9+.-]+):/+(.*)", str(text))
    if scheme is None or Path(text).exists():
        return Path(text)
    name, rest = scheme[1], scheme[2].strip("/")
    if name == "file":
        return Path("/" + rest)
    if name == "hf":
        return _hub_location(rest.removeprefix("models/"))
    folder = rest.rpartition("/")[2] or "checkpoint"
    if name == "gs":
        command = f"gsutil -m cp -r gs://{rest} ."
    elif name == "s3":
        command = f"aws s3 cp --recursive s3://{rest} {folder}"
    else:
        raise CheckpointError(f"{name}://{rest} cannot be read: download it, and pass the folder")
    raise CheckpointError(f"{name}://{rest} is not on this machine: download it with `{command}`, and pass {folder}")


def fetch(location: Path | HubLocation) -> Path:
    """The folder on this machine, downloaded (or found in the Hub's cache) if it has to be.

    HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN work as elsewhere. Raises CheckpointError when it cannot be had.
    """
    if isinstance(location, Path):
        return location
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    except ImportError as error:
        raise CheckpointError(f"{location}: downloading needs huggingface_hub, pip install '.[hub]'") from error
    inside = f"{location.subfolder}/" if location.subfolder else ""
    arguments: dict[str, Any] = dict(
        repo_id=location.repository,
        revision=location.revision,
        allow_patterns=[inside + pattern for pattern in WANTED],
        ignore_patterns=[inside + pattern for pattern in UNWANTED],
    )
    try:
        try:
            snapshot = snapshot_download(**arguments)
        except OfflineModeIsEnabled:  # it looks a commit's files up even where they are in the cache
            snapshot = snapshot_download(**arguments, local_files_only=True)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{location} cannot be downloaded ({type(error).__name__}): {reason}") from error
    folder = Path(snapshot) / location.subfolder
    if not folder.is_dir():
        raise CheckpointError(f"{location}: the repository has no folder {location.subfolder}")
    return folder


def _hub_location(rest: str) -> HubLocation:
    name = r"[\w.-]+"
    found = re.fullmatch(rf"({name}/{name})(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.+))?", rest)
    if found is None:
        raise CheckpointError(f"hf://{rest}: expected hf://owner/name[@revision][/subfolder]")
    return HubLocation(found[1], found[2], found[3] or "")
