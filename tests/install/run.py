"""Installs the wheel as a user does and runs every command: `make test-install`. Needs a package index.

Two environments outside the checkout have duq-vla from the wheel: one with the compiler, one with the robot's runtime alone
and the oldest numpy. The commands run in a folder whose own packages bear the names of this repository's folders, and fail
when they are imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = "compile,cuda,demo,server"
IN_WHEEL = (
    "duq/py.typed",
    "duq/compiler/accuracy/report.html",
    "duq/compiler/checkpoint/openpi_configs.toml",
    "duq/plugins/tactics_sm90.json",
    *(f"duq/runtime/robots/{name}.toml" for name in ("aloha", "droid", "libero")),
    *(f"duq/plugins/cuda/{source.name}" for source in (ROOT / "plugins" / "cuda").iterdir()),
)
DECOYS = ("compiler", "examples", "plugins", "runtime", "tests", "tools")
LACKING = {  # commands -> the extra that the compiler's environment does not have
    ("duq-bench-server", "overhead"): "client",
    ("duq-evaluate",): "compile,examples",
    ("duq-study-schemes",): "study",
}
INFER = """
from duq import Policy, runtime
from duq.runtime.observations import load_observations

assert runtime.Policy is Policy
policy = runtime.Policy("engine.plan")
for observation in load_observations("observations.npz"):
    actions = policy.infer(observation)["actions"]
    assert actions.shape == (8, 7), actions.shape
"""
CALL = """
import sys
from websockets.sync.client import connect
from duq.runtime.messages import pack, unpack
from duq.runtime.observations import load_observations

with connect(f"ws://127.0.0.1:{sys.argv[1]}", compression=None, max_size=None) as connection:
    unpack(connection.recv())
    connection.send(pack(load_observations("observations.npz")[0]))
    assert unpack(connection.recv())["actions"].shape == (8, 7)
"""


class Failed(Exception):
    """A check did not hold."""


class Environment:
    """A virtual environment, and the folder that its commands run in."""

    def __init__(self, directory: Path, work: Path, *requirements: str):
        say(f"{directory.name}: {' '.join(requirements)}")
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        self.bin, self.work = directory / "bin", work
        # Python compiles what the commands import, once; pip would compile every file of every package.
        pip = [self.bin / "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        subprocess.run([*pip, *requirements], check=True, cwd=work)

    @property
    def variables(self) -> dict[str, str]:
        """Of the commands: the decoys come first, and no checkout is on the path."""
        return os.environ | {"PYTHONPATH": str(self.work), "DUQ_CACHE": str(self.work / "cache")}

    def run(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs a command of this environment; Failed with its output where it does not end with `code`."""
        say(f"  {' '.join(str(each) for each in arguments if chr(10) not in str(each))}")
        program, *rest = map(str, arguments)
        command = [str(self.bin / program), *rest]
        ran = subprocess.run(command, cwd=self.work, env=self.variables, text=True, capture_output=True, check=False)
        if ran.returncode != code:
            raise Failed(f"{' '.join(command)}: exit code {ran.returncode}, expected {code}\n{ran.stdout}{ran.stderr}")
        return ran


def say(line: str) -> None:
    print(line, flush=True)


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Failed(what)


def build(directory: Path) -> Path:
    """The wheel, built from the source distribution."""
    subprocess.run([sys.executable, "-m", "venv", directory / "build"], check=True)
    python = directory / "build" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "build"], check=True)
    subprocess.run([python, "-m", "build", "--outdir", directory, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = directory.glob("duq_vla-*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in IN_WHEEL:
        check(name in names, f"{wheel.name}: lacks {name}")
    check(any(name.endswith("/LICENSE") for name in names), f"{wheel.name}: lacks LICENSE")
    strangers = {name.split("/")[0] for name in names if not name.startswith(("duq/", "duq_vla-"))}
    check(not strangers, f"{wheel.name}: installs {', '.join(sorted(strangers))} beside duq")


def lay_decoys(work: Path) -> None:
    for name in DECOYS[:3]:
        (work / name).mkdir()
        (work / name / "__init__.py").write_text(f'raise ImportError("{name} of the working directory")\n')
    for name in DECOYS[3:]:
        (work / f"{name}.py").write_text(f'raise ImportError("{name} of the working directory")\n')
    for name in ("duq.toml", "pyproject.toml", "libero.toml"):
        (work / name).write_text("not = [TOML\n")


def check_installed(environment: Environment) -> None:
    """The package comes from the wheel, with the compiled loops, and every command explains itself by its name."""
    place = environment.run("python", "-c", "import duq, sys; print(duq.__file__)").stdout
    check(place.startswith(str(environment.bin.parent)), f"duq is imported from {place}")
    loops = environment.run("python", "-c", "from duq.runtime import images; print(images._compiled is not None)").stdout
    check(loops == "True\n", "the C extension was not built")


def check_compiler(environment: Environment) -> None:
    """Every command's main job, on a policy of one layer."""
    run, commands = environment.run, {path.name for path in environment.bin.glob("duq-*")}
    for name in sorted(commands):
        check(f"Usage: {name}" in run(name, "--help").stdout, f"{name} --help: does not show its name")
    for (name, *arguments), extra in LACKING.items():
        error = run(name, *arguments, code=2).stderr
        check(error.startswith(f"error: {name} needs ") and f"'duq-vla[{extra}]'" in error, f"{name}: {error}")
    sizes = ("--depth", 1, "--vision-depth", 1, "--action-horizon", 8)
    run("duq-make-checkpoint", "--variant", "tiny", *sizes, "--robot", "libero", "--out", "checkpoint")
    run("duq-demo", "observations", "calibration.npz", "--count", 2, "--seed", 0)
    run("duq-demo", "observations", "observations.npz", "--count", 2, "--seed", 1)
    run("duq-quantize", "checkpoint", "--robot", "libero", "--calibration", "calibration.npz", "--out", "packs")
    compiling = ("duq-compile", "checkpoint", "--robot", "libero", "--packs", "packs")
    compiled = json.loads(run(*compiling, "--out", "engine.plan", "--json").stdout)
    check(compiled["bytes"] == (environment.work / "engine.plan").stat().st_size, "duq-compile --json: another size")
    run("duq-compile", "checkpoint", "--robot", "libero", "--quant", "none", "--out", "float.plan")
    run(*compiling, "--target", "cuda", "--sm", 86, "--out", "cuda.plan")
    manifest = json.loads(run("duq-inspect", "engine.plan", "--json").stdout)
    check(bool(manifest["quantization"]["linears"]), "engine.plan: nothing is quantized")
    check("schedule" in run("duq-inspect", "cuda.plan", "--entries").stdout, "cuda.plan: has no schedule")
    run("duq-demo", "run", "engine.plan", "observations.npz")
    compared = json.loads(
        run("duq-compare", "checkpoint", "engine.plan", "--observations", "observations.npz", "--report", "report.html",
            "--min-cosine", 0.9, "--fail-on", "never", "--json").stdout
    )  # fmt: skip
    check("stages" in compared, "duq-compare: no stages")
    check("<svg" in (environment.work / "report.html").read_text(), "report.html: no charts")
    pair = json.loads(
        run("duq-compare", "float.plan", "engine.plan", "--observations", "observations.npz", "--json").stdout
    )
    check(len(pair["dimensions"]) == 7, "duq-compare of two plans: not the robot's actions")
    check("W4A8" in run("duq-inspect", "float.plan", "--diff", "engine.plan").stdout, "duq-inspect --diff: no linears")
    run("duq-doctor", "engine.plan", "--target", "cuda", "--do", "compile")
    bench = run("duq-bench", "--variant", "tiny", "--quant", "none", "--rounds", 1, "--no-torch-compile", "--json")
    check(len(json.loads(bench.stdout)["results"][0]["milliseconds"]) == 2, "duq-bench: expected PyTorch and the engine")
    check("An estimate for A40 (SM 86)" in run("duq-estimate", "cuda.plan", "--gpu", "a40").stdout, "duq-estimate: none")
    run("python", "-c", INFER)
    check_server(environment)


def check_server(environment: Environment) -> None:
    """duq-serve starts, answers a call, and stops at SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    say("  duq-serve engine.plan")
    command = [environment.bin / "duq-serve", "engine.plan", "--port", str(port)]
    server = subprocess.Popen(command, cwd=environment.work, env=environment.variables)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/healthz", server)
        environment.run("python", "-c", CALL, port)
        server.send_signal(signal.SIGTERM)
        check(server.wait(timeout=30) == 0, "duq-serve: SIGTERM did not end it with code 0")
    finally:
        server.kill()


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url) as reply:
                check(reply.read() == b"OK\n", "duq-serve: /healthz is not OK")
            return
        except OSError:  # nobody listens yet
            time.sleep(0.1)
    raise Failed("duq-serve: does not listen")


def check_robot(environment: Environment) -> None:
    """The runtime alone, beside numpy 1: the same plan runs, and the compiler's commands say how to get it."""
    environment.run("python", "-c", f"import numpy\nassert numpy.__version__.startswith('1.26')\n{INFER}")
    run = environment.run
    run("duq-inspect", "engine.plan")
    run("duq-doctor", "engine.plan", "--target", "cpu")
    run("duq-doctor", "--target", "cpu", "--do", "compile", code=1)
    timed = json.loads(run("duq-bench", "engine.plan", "--calls", 5, "--json").stdout)
    check(len(timed["times_ms"]) == 5, "duq-bench engine.plan: expected five calls")
    run("duq-compare", "float.plan", "engine.plan", "--observations", "observations.npz")
    check("complete" in run("duq-completion", "bash").stdout, "duq-completion: prints no script")
    check("An estimate" in run("duq-estimate", "cuda.plan", "--gpu", "a40").stdout, "duq-estimate: none")
    for *arguments, extra in (
        ("duq-compile", "checkpoint", "--out", "new.plan", "compile"),
        ("duq-compare", "checkpoint", "engine.plan", "compile"),
        ("duq-demo", "observations", "new.npz", "--count", 1, "--seed", 0, "demo"),
        ("duq-serve", "engine.plan", "server"),
    ):
        name = arguments[0]
        check(f"Usage: {name}" in run(name, "--help").stdout, f"{name} --help: does not show its name")
        error = run(*arguments, code=2).stderr
        check(f"error: {name} needs " in error and error.endswith(f"pip install 'duq-vla[{extra}]'\n"), f"{name}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="Folder to work in, kept afterwards; by default a temporary one.")
    keep = parser.parse_args().keep
    directory = Path(tempfile.mkdtemp(prefix="duq-install-")) if keep is None else keep.resolve()
    if ROOT in (directory, *directory.parents):
        parser.error(f"--keep {keep}: lies in the checkout; name another folder")
    work = directory / "work"
    work.mkdir(parents=True)
    lay_decoys(work)
    try:
        wheel = build(directory)
        check_contents(wheel)
        constraints = ("--constraint", str(ROOT / "constraints.txt"))
        compiler = Environment(directory / "compiler", work, *constraints, f"duq-vla[{EXTRAS}] @ {wheel.as_uri()}")
        check_installed(compiler)
        check_compiler(compiler)
        robot = Environment(directory / "robot", work, str(wheel), "numpy==1.26.*")
        check_installed(robot)
        check_robot(robot)
    except Failed as failure:
        sys.exit(f"FAILED {failure}")
    finally:
        if keep is None:
            shutil.rmtree(directory)
    say("1 passed, 0 failed")


if __name__ == "__main__":
    main()
