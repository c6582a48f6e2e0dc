"""Trains a small pi0 on LIBERO-Object's ten tasks, from scratch: `python examples/libero/train.py --help`.

Flow-matching behavior cloning, as examples/train_metaworld.py explains it. Beside the velocity, the images' tokens learn to
say where every object is, and the language model where the one is that the prompt asks for; what says it is not part of the
policy.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the checkout
    from duq.commands import command

    command("train.py", "duq.examples.libero.train:main", "compile")()

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn

from duq.compiler.checkpoint.names import openpi_name
from duq.compiler.checkpoint.synthetic.files import (
    ROBOTS,
    TOKENIZER_SIZE,
    dimensions,
    openpi_settings,
    train_tokenizer,
    write_json,
)
from duq.compiler.model import Pi0, siglip
from duq.compiler.model.gemma import KeyValue
from duq.examples.libero import demonstrations
from duq.examples.libero.demonstrations import LEAST
from duq.examples.libero.render import render, rendered
from duq.examples.libero.scene import CAMERAS
from duq.examples.train_metaworld import draw_noise, initialize, make_optimizer
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import check_output_directory, one_line_errors
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig
from duq.runtime.observations import save_observations
from duq.runtime.preprocess import Normalizer
from duq.runtime.tokenizer import Tokenizer

POLICY = ModelConfig(  # 20.9 M weights; heads of 72 and 256, as every pi0 has
    pi05=False,
    vision=VisionConfig(width=432, depth=6, mlp_width=864, heads=6, image_size=168),
    llm=GemmaConfig(width=384, depth=4, mlp_width=1024, heads=2, kv_heads=1, head_dim=256),
    expert=GemmaConfig(width=256, depth=4, mlp_width=768, heads=2, kv_heads=1, head_dim=256),
    vocab_size=TOKENIZER_SIZE,
    action_horizon=10,
)
DRAWS = 4  # of noise and time for each observation: the action expert is much cheaper than the prefix which they share
SHIFT = 2  # pixels that images are moved by, at most: more would lie about where things are
BRIGHTNESS, COLOR = 0.15, 0.08  # of images, deviation: gain and bias of all channels, gain of each
STATE_NOISE = 0.02  # deviation, in deviations of the state
TARGET = 0.1  # m that count as 1 where an object is to be located
TARGET_WEIGHT = 0.3  # of the losses of places against the velocity's
HELD_OUT = 20  # one demonstration of so many is not trained on
EMA_DECAY = 0.999
REPORT_STEPS = 250
SAVE_SECONDS = 60  # between two states of a run: 0.4 GB each
CALIBRATION = 64

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


# --- data ---------------------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """N moments of demonstrations, normalized as the runtime does it, on one device."""

    pictures: Tensor  # uint8 [N, C, S, S, 3]
    tokens: Tensor  # int64 [N, T]
    token_mask: Tensor  # bool [N, T]
    states: Tensor  # float32 [N, A]
    actions: Tensor  # float32 [N, H, A]
    valid: Tensor  # bool [N, H]: what follows until the next push or the end
    targets: Tensor  # float32 [N, 3]
    objects: Tensor  # float32 [N, K, 3]: where everything is that any task has; NaN for what is not there

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: str) -> Moments:
        return Moments(*(tensor.to(device) for tensor in vars(self).values()))

    def take(self, index: Tensor) -> Moments:
        return Moments(*(tensor[index] for tensor in vars(self).values()))


def chunks(actions: np.ndarray, pushed: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """The actions from each step of an episode on, [T, horizon, A], and which of them count, bool [T, horizon].

    Those after the next push do not: what the expert did then answers something that the observation does not show.
    Neither does what lies behind the end.
    """
    steps = np.arange(len(actions))[:, None] + np.arange(horizon)
    inside = steps < len(actions)
    steps = steps.clip(max=len(actions) - 1)
    return actions[steps], np.logical_and.accumulate(inside & ~pushed[steps], axis=1)


def statistics(values: np.ndarray) -> dict[str, list[float]]:
    """Norm stats of [N, dims], in openpi's form."""
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    found = {"mean": values.mean(axis=0), "std": values.std(axis=0), "q01": low, "q99": high}
    return {name: np.round(each.astype(np.float64), 6).tolist() for name, each in found.items()}


@dataclass
class Recorded:
    """Everything that was demonstrated, and what it takes to run a policy that was trained on it."""

    kept: Moments
    held_out: Moments
    stats: dict[str, dict[str, list[float]]]
    tokenizer: bytes
    observations: list[dict]  # some of the kept, as the robot has them, to calibrate a quantizer on
    fingerprint: str


def read(directory: Path, config: ModelConfig, every: int = 1, jobs: list[tuple[int, int]] | None = None) -> Recorded:
    """Reads demonstrations with pictures of one of `every` moments; by default all. Raises DuqError if there are too few."""
    size, horizon, tokenizer = config.vision.image_size, config.action_horizon, train_tokenizer()
    jobs = demonstrations.listed(directory) if jobs is None else jobs
    if len(jobs) < 2:
        raise DuqError(f"{directory}: {len(jobs)} demonstrations are too few, as some are held out; collect or render more")
    files = [demonstrations.path_of(directory, *job) for job in jobs]
    episodes = [demonstrations.load(file) for file in files]
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda file: demonstrations.load_seen(file, size, every), files))
    found = [
        [part[each.steps] for part in chunks(episode.actions, episode.pushed, horizon)]
        for episode, each in zip(episodes, seen, strict=True)
    ]
    chosen = [valid[:, : min(LEAST, horizon)].all(axis=1) for _, valid in found]

    def join(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([part[which] for part, which in zip(parts, chosen, strict=True)])

    robot, actions, valid = join([each.robot for each in seen]), join([a for a, _ in found]), join([v for _, v in found])
    if not len(robot):
        raise DuqError(f"{directory}: no moment is followed by {min(LEAST, horizon)} undisturbed actions; collect more")
    stats = {"state": statistics(robot), "actions": statistics(actions[valid])}
    of = np.repeat(np.arange(len(jobs)), [which.sum() for which in chosen])
    prompts = [seen[i].prompt for i in of]
    tokens, token_mask = tokenized(prompts, tokenizer, config)
    moments = Moments(
        torch.from_numpy(join([each.pictures for each in seen])),
        tokens,
        token_mask,
        normalized(robot, stats, "state", config.state_width),
        normalized(actions, stats, "actions", config.action_dim),
        torch.from_numpy(valid),
        torch.from_numpy(join([each.targets for each in seen])),
        torch.from_numpy(join(by_name(seen))),
    )
    held = torch.from_numpy(held_out(jobs)[of])
    keys = tuple(CAMERAS)
    some = np.linspace(0, int((~held).sum()) - 1, CALIBRATION).round().astype(int)
    kept = np.flatnonzero(~held.numpy())[some]
    observations = [
        dict(zip(keys, moments.pictures[i].numpy(), strict=True)) | {"observation/state": robot[i], "prompt": prompts[i]}
        for i in kept
    ]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return Recorded(moments.take(~held), moments.take(held), stats, tokenizer, observations, digest)


def by_name(seen: list[demonstrations.Seen]) -> list[np.ndarray]:
    """Where things are, float32 [N, K, 3] of each demonstration, in one order of all names; NaN for what is not there."""
    known = sorted({str(name) for each in seen for name in each.names})
    found = []
    for each in seen:
        places = np.full((len(each.steps), len(known), 3), np.nan, np.float32)
        places[:, [known.index(str(name)) for name in each.names]] = each.objects
        found.append(places)
    return found


def held_out(jobs: list[tuple[int, int]]) -> np.ndarray:
    """Which demonstrations not to train on, bool [N]: one of HELD_OUT of each task, and at least one in all."""
    count: dict[int, int] = {}
    held = []
    for task, _ in jobs:
        held.append(count.get(task, 0) % HELD_OUT == HELD_OUT - 1)
        count[task] = count.get(task, 0) + 1
    if not any(held):
        held[-1] = True
    return np.array(held)


def tokenized(prompts: list[str], tokenizer: bytes, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Tokens and their mask [N, T], T the longest prompt's. DuqError if that is longer than the policy takes."""
    encode, known = Tokenizer(tokenizer).encode, sorted(set(prompts))
    ids = [torch.tensor(encode(prompt)) for prompt in known]
    for prompt, each in zip(known, ids, strict=True):
        if len(each) > config.max_prompt_tokens:
            raise DuqError(f"{prompt!r} has {len(each)} tokens, and the policy takes {config.max_prompt_tokens}")
    which = torch.tensor([known.index(prompt) for prompt in prompts])
    tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)[which]
    return tokens.clamp_min(0), tokens >= 0


def normalized(values: np.ndarray, stats: dict, key: str, width: int) -> Tensor:
    """As the runtime does it for a pi0, padded with zeros to [..., width]."""
    normalizer = Normalizer(stats[key], key, values.shape[-1], quantiles=False, epsilon=1e-6)
    scaled = torch.from_numpy(normalizer.normalize(values.astype(np.float64)).astype(np.float32))
    return F.pad(scaled, (0, width - values.shape[-1]))


def augmented(pictures: Tensor, shift: int = 0, brightness: float = 0.0, color: float = 0.0) -> Tensor:
    """uint8 [B, C, S, S, 3] -> float32 [B, C, 3, S, S] as the model takes them, each image moved and tinted at random."""
    batch, cameras, size = pictures.shape[:3]
    device = pictures.device
    moved = torch.randint(-shift, shift + 1, (2, batch, cameras, 1), device=device)
    rows, columns = (torch.arange(size, device=device) + moved).clamp(0, size - 1)
    which, camera = torch.arange(batch, device=device)[:, None, None, None], torch.arange(cameras, device=device)
    pixels = pictures[which, camera[:, None, None], rows[..., None], columns[..., None, :]]
    gain, bias = brightness * torch.randn(2, batch, cameras, 1, 1, 1, device=device)
    tint = color * torch.randn(batch, cameras, 1, 1, 3, device=device)
    return ((pixels.to(torch.float32) / 127.5 - 1) * (1 + gain + tint) + bias).permute(0, 1, 4, 2, 3)


# --- the loss -----------------------------------------------------------------------------------------------------------


def velocities(
    policy: Pi0, states: Tensor, x_t: Tensor, times: Tensor, prefix_mask: Tensor, past: list[KeyValue]
) -> Tensor:
    """A pi0's velocities [B, R, H, A] of R draws for each observation, `Pi0.velocity` of each in one pass: draws share the
    prefix, and none sees another. x_t [B, R, H, A], times [B, R]."""
    batch, draws, horizon = x_t.shape[:3]
    x, condition = policy.embed_suffix(states.repeat_interleave(draws, dim=0), x_t.flatten(0, 1), times.flatten())
    assert condition is None, "pi0.5's norms depend on the time, which draws do not share"
    length = x.shape[1]
    position = torch.arange(draws * length, device=x.device)
    draw, row = position // length, position % length
    sees = (draw[:, None] == draw) & ((row == 0) | (row[:, None] > 0))  # a state token does not see the actions
    mask = torch.cat((prefix_mask[:, None].expand(-1, len(row), -1), sees.expand(batch, -1, -1)), dim=-1)
    positions = prefix_mask.sum(dim=1, keepdim=True) + row
    hidden, _ = policy.expert(x.reshape(batch, draws * length, -1), positions, mask[:, None], past)
    return policy.action_out_proj(hidden.view(batch, draws, length, -1)[:, :, -horizon:])


class Patches(siglip.Embeddings):
    """The embedding of patches as a matrix product: cuDNN's convolutions of so few channels took 20 of a step's 94 ms (H200)."""

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, S, S] -> tokens [N, (S / patch)^2, width]."""
        convolution = self.patch_embedding
        patches = F.pixel_unshuffle(images, convolution.kernel_size[0]).flatten(2).transpose(1, 2)
        return F.linear(patches, convolution.weight.flatten(1), convolution.bias) + self.position_embedding.weight


class Learner(nn.Module):
    """The policy, and what reads off it where things are: all `objects` off the images' tokens, and the one that the prompt
    asks for off the prompt's last token."""

    def __init__(self, config: ModelConfig, objects: int):
        super().__init__()
        policy = Pi0(config)
        policy.vision.embeddings = Patches(config.vision)
        self.policy = initialize(policy)
        self.locate = nn.Linear(config.llm.width, 3)
        self.attend, self.place = nn.Linear(config.llm.width, objects), nn.Linear(config.llm.width, 3)

    def forward(self, images: Tensor, batch: Moments, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared errors of the velocities, of the wanted object's place, and of all objects'. images [B, C, 3, S, S]
        float32; noise [B, R, H, A] and times [B, R]: R draws for each of the B observations."""
        policy = self.policy
        image_mask = batch.token_mask.new_ones(len(images), images.shape[1] * policy.config.vision.tokens)
        mask = torch.cat((image_mask, batch.token_mask), dim=1)
        with torch.autocast(
            noise.device.type, torch.bfloat16, enabled=noise.is_cuda
        ):  # not the expert: x_t wants its digits
            image_tokens = policy.embed_images(images)
            hidden, past = policy.prefix(image_tokens, batch.tokens, mask)
        last = hidden[torch.arange(len(hidden), device=mask.device), mask.sum(dim=1) - 1]
        located = F.mse_loss(self.locate(last.float()), batch.targets / TARGET)

        actions, t = batch.actions[:, None], times[..., None, None]
        past = [(key.to(noise.dtype), value.to(noise.dtype)) for key, value in past]
        velocity = velocities(policy, batch.states, t * noise + (1 - t) * actions, times, mask, past)
        error = (velocity - (noise - actions)).square().mean(dim=-1)
        valid = batch.valid[:, None].expand_as(error)
        return (
            (error * valid).sum() / valid.sum().clamp_min(1),
            located,
            self._everywhere(image_tokens.float(), batch.objects),
        )

    def _everywhere(self, image_tokens: Tensor, objects: Tensor) -> Tensor:
        """Each object attends to what shows it."""
        shown = self.attend(image_tokens).softmax(dim=1).transpose(1, 2) @ image_tokens
        there = ~objects.isnan()
        error = torch.where(there, self.place(shown) - objects.nan_to_num() / TARGET, 0.0).square()
        return error.sum() / there.sum().clamp_min(1)


def drawn(batch: Moments) -> tuple[Tensor, Tensor]:
    """Noise [B, DRAWS, H, A] and times [B, DRAWS]."""
    return draw_noise(cast(Any, batch), DRAWS)  # of the actions' shape


@torch.no_grad()
def held_out_loss(learner: Learner, data: Moments) -> tuple[float, float, float]:
    """The losses on a fixed sample of moments, noise and times."""
    device = data.states.device
    with torch.random.fork_rng(devices=[device] if data.states.is_cuda else []):
        torch.manual_seed(0)
        total, batches = torch.zeros(3), max(1, min(8, len(data) // 128))
        for _ in range(batches):
            batch = data.take(torch.randint(len(data), (min(128, len(data)),), device=device))
            total += torch.tensor([x.item() for x in learner(augmented(batch.pictures), batch, *drawn(batch))])
    velocity, located, everywhere = (total / batches).tolist()
    return velocity, located, everywhere


# --- training -----------------------------------------------------------------------------------------------------------


@dataclass
class Schedule:
    """How long to train and how fast: until `steps` or `minutes` are over, whichever comes first."""

    steps: int = 12_000
    minutes: float = math.inf
    batch: int = 256
    learning_rate: float = 6e-4
    warmup: int = 500

    def rate(self, step: int, progress: float) -> float:
        """Linear warm-up, then a cosine to zero over what there is of steps and time (`progress` from 0 to 1)."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def centimeters(losses: list[float]) -> list[float]:
    """Along each axis, root mean square, of losses of places."""
    return [100 * TARGET * loss**0.5 for loss in losses]


class Training:
    """A training run; `state` and `restore` let it go on in another process."""

    def __init__(
        self, config: ModelConfig, objects: int, schedule: Schedule, seed: int, device: str, compiled: bool = False
    ):
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")  # TF32, on GPUs
        self.schedule, self.seed, self.device = schedule, seed, device
        self.learner = Learner(config, objects).to(device)
        self.average = copy.deepcopy(self.learner).requires_grad_(False)
        self.best = copy.deepcopy(self.average.policy)
        self.weights, self.averages = list(self.learner.parameters()), list(self.average.parameters())
        self.optimizer = make_optimizer(self.weights)
        self.forward = torch.compile(self.learner) if compiled else self.learner
        self.step, self.seconds, self.lowest = 0, 0.0, math.inf
        self.history: list[dict] = []

    @property
    def progress(self) -> float:
        return min(1.0, max(self.step / self.schedule.steps, self.seconds / 60 / self.schedule.minutes))

    def run(self, recorded: Recorded, report: Callable[[dict], None], keep: Callable[[], None]) -> None:
        """Trains to the end. `report(losses)` is called now and then, and `keep()` after it: the moment to save the state."""
        recent, started = [], time.perf_counter() - self.seconds
        while self.progress < 1:
            recent.append(self._advance(recorded.kept))
            self.step, self.seconds = self.step + 1, time.perf_counter() - started
            if self.step % REPORT_STEPS == 0 or self.progress >= 1:
                loss, *places = torch.stack(recent).mean(dim=0).tolist()
                held, *held_places = held_out_loss(self.average, recorded.held_out)
                if held < self.lowest:
                    self.lowest = held
                    self.best.load_state_dict(self.average.policy.state_dict())
                self.history.append(
                    {"step": self.step, "seconds": round(self.seconds), "loss": loss, "held_out": held}
                    | dict(zip(("target_cm", "objects_cm"), centimeters(places), strict=True))
                    | dict(zip(("held_out_target_cm", "held_out_objects_cm"), centimeters(held_places), strict=True))
                )
                recent.clear()
                report(self.history[-1])
                keep()

    def _advance(self, data: Moments) -> Tensor:
        """One step; its losses [3]. All draws follow from the seed and the step."""
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step, self.progress)
        batch = data.take(torch.randint(len(data), (self.schedule.batch,), device=self.device))
        noise = STATE_NOISE * torch.randn_like(batch.states) * (batch.states != 0)  # not of the padding
        batch = replace(batch, states=batch.states + noise)
        losses = self.forward(augmented(batch.pictures, SHIFT, BRIGHTNESS, COLOR), batch, *drawn(batch))
        self.optimizer.zero_grad()
        (losses[0] + TARGET_WEIGHT * (losses[1] + losses[2])).backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(
            tuple(self.averages), tuple(self.weights), 1 - min(EMA_DECAY, (self.step + 1) / (self.step + 10))
        )
        return torch.stack(losses).detach()

    def state(self) -> dict[str, Any]:
        return {
            "learner": self.learner.state_dict(),
            "average": self.average.state_dict(),
            "best": self.best.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.step, self.seconds, self.lowest),
            "history": self.history,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.average.load_state_dict(state["average"])
        self.best.load_state_dict(state["best"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.lowest = state["progress"]
        self.history = list(state["history"])


def save_checkpoint(out: Path, policy: Pi0, recorded: Recorded, notes: dict) -> None:
    """Writes openpi's layout in bfloat16, with norm stats, and beside it calibration.npz, the robot's observations.

    `out` appears when everything is written.
    """
    weights = {openpi_name(name): tensor.to("cpu", torch.bfloat16) for name, tensor in policy.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as directory:
        draft = Path(directory) / out.name
        assets = draft / "assets" / ROBOTS["libero"][2]
        assets.mkdir(parents=True)
        save_file(weights, draft / "model.safetensors", {"format": "pt"})
        (draft / "model.safetensors").chmod(0o644)
        settings = openpi_settings(policy.config, "bfloat16", dimensions(policy.config))
        write_json(draft / "config.json", settings | {"rotary": "exact"})  # trained in float32, and only then rounded
        write_json(draft / "training.json", notes)
        write_json(assets / "norm_stats.json", {"norm_stats": recorded.stats})
        (draft / "tokenizer.model").write_bytes(recorded.tokenizer)
        save_observations(draft / "calibration.npz", recorded.observations)
        draft.replace(out)


@app.command()
def _train(
    directory: Annotated[Path, typer.Argument(help="What collect.py recorded.")],
    out: Annotated[
        Path, typer.Option(help="Checkpoint directory to create. Until it is done, OUT.state has what there is.")
    ],
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = Schedule.steps,
    minutes: Annotated[float, typer.Option(min=0.01, help="The most it may take, all runs of it together.")] = math.inf,
    batch: Annotated[int, typer.Option(min=1, help="Observations in a step.")] = Schedule.batch,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="The largest.")] = Schedule.learning_rate,
    every: Annotated[
        int, typer.Option(min=1, help="Learn from one of so many moments: more demonstrations instead of pictures.")
    ] = 1,
    render_minutes: Annotated[
        float, typer.Option(min=0.0, help="The most that rendering may take; demonstrations without pictures are left out.")
    ] = math.inf,
    image_size: Annotated[int | None, typer.Option(min=14, help="Of the policy's images, a multiple of 14 pixels.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that render.")] = os.cpu_count() or 1,
    compiled: Annotated[bool, typer.Option("--torch-compile", help="Compile the loss with torch.compile.")] = False,
    deterministic: Annotated[
        bool, typer.Option(help="Use only kernels that give the same bits again; slower. With --steps, not --minutes.")
    ] = False,
) -> None:
    """Train a small pi0 on demonstrations, from scratch, and write a checkpoint that [bold]duq-compile[/bold] takes.

    Renders first what is not rendered. The weights are the moving average with the lowest loss on demonstrations that are
    held out. A run that was stopped goes on where it was, at most a minute before.

    [bold]Examples[/bold]

      python examples/libero/train.py demonstrations --out policy --minutes 20 --torch-compile

      python examples/libero/train.py demonstrations --out policy --device cpu --steps 20 --batch 4
    """
    check_output_directory("--out", out)
    if out.exists():
        raise DuqError(f"--out {out}: already exists; choose another directory or remove it")
    if deterministic:
        if minutes != math.inf:
            raise DuqError("--deterministic: the clock does not give the same steps again; give --steps, not --minutes")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device == "cuda" and not torch.cuda.is_available():
        raise DuqError("--device cuda: PyTorch finds no GPU that it can use; --device cpu trains slowly")
    schedule = Schedule(steps, minutes, batch, learning_rate)
    policy = POLICY
    if image_size is not None:
        if image_size % policy.vision.patch_size:
            raise DuqError(f"--image-size {image_size}: is no multiple of {policy.vision.patch_size}")
        policy = replace(policy, vision=replace(policy.vision, image_size=image_size))
    size = policy.vision.image_size
    if render_minutes:
        render(directory, size, jobs, every, render_minutes)
    recorded = read(directory, policy, every, None if render_minutes == math.inf else rendered(directory, size, every))
    settings = {"policy": policy.to_json(), **asdict(schedule), "seed": seed, "demonstrations": recorded.fingerprint}
    settings |= {"every": every, "minutes": None if minutes == math.inf else minutes}  # JSON knows no infinity
    training = Training(policy, recorded.kept.objects.shape[1], schedule, seed, device, compiled)
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = out.with_name(f"{out.name}.state")
    restore(training, kept, settings)
    recorded = replace(recorded, kept=recorded.kept.to(device), held_out=recorded.held_out.to(device))
    moments = f"{len(recorded.kept)} moments, and {len(recorded.held_out)} held out"
    saved = time.monotonic()
    with Progress() as progress:
        progress.console.print(moments)
        bar = progress.add_task("Training", total=1.0)
        progress.update(bar, completed=training.progress)

        def report(losses: dict) -> None:
            progress.update(bar, completed=training.progress)
            progress.console.print(", ".join(f"{key} {value:.4g}" for key, value in losses.items()))

        def keep() -> None:
            nonlocal saved
            if training.progress < 1 and time.monotonic() - saved < SAVE_SECONDS:
                return
            saved = time.monotonic()
            demonstrations.write_whole(kept, lambda stream: torch.save({"settings": settings, **training.state()}, stream))

        training.run(recorded, report, keep)
    best = min(training.history, key=lambda losses: losses["held_out"])
    save_checkpoint(out, training.best, recorded, {"settings": settings, "best": best, "losses": training.history})
    kept.unlink(missing_ok=True)
    print(f"{out}: {sum(p.numel() for p in training.best.parameters()) / 1e6:.1f} M weights, of step {best['step']}")


def restore(training: Training, kept: Path, settings: dict) -> None:
    """Goes on from the file `kept`, where there is one. DuqError if that run had other settings."""
    if not kept.exists():
        return
    try:
        state = torch.load(kept, map_location=training.device, weights_only=True)
        others = [name for name, value in settings.items() if state["settings"].get(name) != value]
        if not others:
            training.restore(state)
    except Exception as error:
        raise DuqError(
            f"{kept}: is no state of a run ({type(error).__name__}: {error}); remove it to begin anew"
        ) from error
    if others:
        raise DuqError(f"{kept}: is of a run with another {others[0]}; remove it to begin anew, or name another --out")


def main() -> None:
    with one_line_errors():
        app()
