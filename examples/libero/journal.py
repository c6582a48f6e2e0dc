"""A file of JSON lines that a run adds to, and that a later run goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duq.plugins.errors import DuqError


class Journal:
    """What was done, a line each. A line that a stopped run left unfinished is dropped; any other that is no JSON object is
    refused."""

    def __init__(self, file: Path):
        self.file = file

    def add(self, line: dict[str, Any]) -> None:
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines. Cuts an unfinished one off the file. Raises DuqError for others."""
        if not self.file.exists():
            return []
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with open(self.file, "r+b") as stream:
                stream.truncate(len(whole))
        return list(self._parse(whole))

    def _parse(self, content: bytes) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise DuqError(f"{self.file}: line {number} is no JSON object; remove it, or the file to begin anew")
            yield found
