"""The phases of the cuda target as text files, for --keep-phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from duq.compiler.targets.cuda.choose import Chosen
from duq.compiler.targets.cuda.emit import Planned
from duq.compiler.targets.cuda.specialize import Size
from duq.plugins.gpu import Gpu
from duq.runtime.files import write_text, writing


class Report:
    """Writes into `directory`, or nowhere if it is None."""

    def __init__(self, directory: Path | None):
        self._directory = directory

    def __call__(self, name: str, text: str) -> None:
        if self._directory is not None:
            with writing(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
            write_text(self._directory / f"cuda-{name}.txt", text)

    def tactics(self, gpu: Gpu, size: Size, chosen: Mapping[str, Chosen]) -> None:
        for name, each in chosen.items():
            self(f"sm{gpu.sm}-{size.cameras}x{size.prompt}-choose-{name}", str(each))

    def programs(self, gpu: Gpu, planned: Sequence[Planned]) -> None:
        for program, streams, memory in planned if self._directory is not None else ():
            stem = f"sm{gpu.sm}-{program.cameras}x{program.prompt}"
            for name, launches in (("prefix", program.prefix), ("step", program.step)):
                self(f"{stem}-bind-{name}", "".join(f"{index:4d} {each}\n" for index, each in enumerate(launches)))
            chains = [f"{each.first:4d} to {each.last}: {each.instance.shape}\n" for each in program.chains]
            self(f"{stem}-chains", "".join(chains))
            waits = [f"{launch.name}: waits for {found}\n" for launch, found in streams.waits.items() if found]
            self(f"{stem}-plan-streams", "".join([*waits, *(f"{each.name}: overlaps\n" for each in program.launches
                                                            if each in streams.overlaps)]))  # fmt: skip
            places = sorted(memory.offsets.items(), key=lambda item: item[1])
            lines = [f"{offset:12d} {buffer.bytes:12d} {buffer.name}\n" for buffer, offset in places]
            self(f"{stem}-plan-memory", "".join([*lines, f"{memory.arena_bytes:12d} bytes\n"]))
