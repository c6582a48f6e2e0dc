"""Runs docs/lerobot.md as it stands, in a folder where its checkpoints, data and robot are small ones.

    python tests/peers/replay_docs.py BIN CASES

BIN: the folder of the compiler's commands; CASES: what lerobot_policies.py and duq-make-checkpoint wrote. Runs where LeRobot
is installed. What is changed in a command: a robot or an environment that is not here becomes tests/peers/fakes.py's, and
60 seconds become 4. LeRobot finds those as a plug-in, which is a module and a few lines of metadata on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "lerobot.md"
COMMANDS = ("duq-", "lerobot-", "python -m lerobot")
SERVERS = {"duq-lerobot-server": 8080, "duq-serve": 8000}  # and the ports that the page names
PLUGIN = "lerobot_robot_duq_fake"
OPENPI = """
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
recorded = np.load("observations.npz")
observation = {key: recorded[key][0] for key in ("observation/image", "observation/wrist_image", "observation/state")}
actions = WebsocketClientPolicy("127.0.0.1", 8000).infer(observation | {"prompt": str(recorded["prompt"][0])})["actions"]
assert actions.shape == (10, 7) and np.isfinite(actions).all(), actions
"""


def steps(page: str) -> list[tuple[str, str]]:
    """(language, text) of each code block and each indented command but pip's, in their order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```|^    (\S[^\n]*)$", page, re.DOTALL | re.MULTILINE)
    return [(language or "sh", text or command) for language, text, command in found
            if language in ("python", "toml") or command.startswith(COMMANDS)]  # fmt: skip


def here(command: str) -> str:
    """The command for what is here."""
    command = re.sub(r" --(robot|env)\.(?!type)\S+", "", command)
    command = re.sub(r"--(robot|env)\.type=\S+", r"--\1.type=duq_fake", command)
    command = command.replace("--duration=60", "--duration=4").replace("--action-horizon 50", "--action-horizon 8")
    if command.startswith("lerobot-eval"):
        command += " --eval.use_async_envs=false"
    return command


def write_dataset(folder: Path) -> None:
    from fakes import CAMERAS, JOINTS, SIDE, TASK, image
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    joints = {"dtype": "float32", "shape": (6,), "names": JOINTS}
    camera = {"dtype": "video", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
    features = {f"observation.images.{name}": camera for name in CAMERAS} | {"observation.state": joints, "action": joints}
    dataset = LeRobotDataset.create("duq/my_arm", fps=10, features=features, root=folder, use_videos=True)
    rng = np.random.default_rng(0)
    for frame in range(6):
        row = {f"observation.images.{name}": image(frame + 99 * index) for index, name in enumerate(CAMERAS)}
        row["observation.state"], row["action"] = rng.standard_normal((2, 6)).astype(np.float32)
        dataset.add_frame(row | {"task": TASK})
    dataset.save_episode()
    dataset.finalize()


def prepare(folder: Path, bin: Path, cases: Path, environment: dict[str, str]) -> None:
    """What the page takes as there."""
    shutil.copytree(cases / "policies" / "pi0" / "pretrained_model", folder / "outputs" / "my_arm" / "pretrained_model")
    write_dataset(folder / "datasets" / "my_arm")
    for name, options in {"pi0_my_arm": (), "pi05_libero": ("--pi05", "--action-horizon", "10")}.items():
        sizes = ("--depth", "1", "--vision-depth", "1", "--robot", "libero", *options)
        command = [bin / "duq-make-checkpoint", *sizes, "--out", folder / "checkpoints" / name]
        subprocess.run(command, check=True, env=environment)
    rng = np.random.default_rng(0)
    rows = {key: rng.integers(0, 256, (6, 64, 64, 3), np.uint8)
            for key in ("observation.images.front", "observation/image", "observation/wrist_image")}  # fmt: skip
    states = {key: rng.normal(0, 0.3, (6, 8)).astype(np.float32) for key in ("observation.state", "observation/state")}
    prompts = {key: np.array(["wave"] * 6) for key in ("task", "prompt")}
    np.savez(folder / "observations.npz", **rows, **states, prompt=prompts["prompt"])


def plugin(folder: Path) -> None:
    """tests/peers/fakes.py, installed under a name that LeRobot imports."""
    shutil.copy(Path(__file__).parent / "fakes.py", folder / f"{PLUGIN}.py")
    (folder / f"{PLUGIN}-0.dist-info").mkdir()
    (folder / f"{PLUGIN}-0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n")


def main() -> None:
    bin, cases = (Path(each).absolute() for each in sys.argv[1:])
    with tempfile.TemporaryDirectory() as directory:
        folder, sent = Path(directory), Path(directory) / "sent.jsonl"
        plugin(folder)
        environment = {**os.environ, "PYTHONPATH": str(folder), "DUQ_FAKE_SENT": str(sent), "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        prepare(folder, bin, cases, os.environ.copy())
        servers = []
        try:
            for language, text in steps(PAGE.read_text(encoding="utf-8")):
                run(language, text, folder, bin, environment, servers)
        finally:
            for server in servers:
                server.terminate()
                server.wait(30)


def run(language: str, text: str, folder: Path, bin: Path, environment: dict, servers: list) -> None:
    if language == "toml":
        (folder / "my_arm.toml").write_text(text)
        return
    if language == "python":
        subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment, check=True)
        print("ran the loop of one's own")
        return
    command, sent = here(text.partition("  #")[0]), Path(environment["DUQ_FAKE_SENT"])
    sent.unlink(missing_ok=True)
    print(f"$ {command}", flush=True)
    compiler = command.split()[0] in ("duq-compile", "duq-serve")
    own = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"} if compiler else environment
    if port := SERVERS.get(command.split()[0]):
        servers.append(serving(command, port, folder, own))
        if port == SERVERS["duq-serve"]:
            subprocess.run([bin / "python", "-c", OPENPI], cwd=folder, check=True)
            print("asked it with openpi's client")
    elif "robot_client" in command:
        client = subprocess.Popen(shlex.split(command), cwd=folder, env=own)
        deadline = time.monotonic() + 120
        while not actions(sent) and client.poll() is None and time.monotonic() < deadline:
            time.sleep(1)
        client.kill()
        client.wait(30)
        assert actions(sent), "the robot got no action from the policy server"
    else:
        subprocess.run(command, shell=True, cwd=folder, env=own, check=True)
        assert not command.startswith("lerobot-rollout") or actions(sent), "the robot got no action"


def serving(command: str, port: int, folder: Path, environment: dict) -> subprocess.Popen:
    """The server, once it accepts connections."""
    assert not listening(port), f"port {port} is another program's; {command} needs it"
    server = subprocess.Popen(shlex.split(command), cwd=folder, env=environment)
    deadline = time.monotonic() + 120
    while not listening(port):
        assert server.poll() is None, f"{command}: ended"
        if time.monotonic() > deadline:
            server.kill()
            raise AssertionError(f"{command}: does not listen on port {port}")
        time.sleep(0.5)
    return server


def listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def actions(sent: Path) -> list:
    """What the robot was sent."""
    return [json.loads(line) for line in sent.read_text().splitlines()] if sent.exists() else []


if __name__ == "__main__":
    main()
