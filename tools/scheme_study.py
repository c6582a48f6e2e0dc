"""The work of duq-study-schemes: each scheme quantizes Gemma 3 270M, and is compared with fp32."""

from __future__ import annotations

import json
import math
import platform
import pydoc_data.topics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import duq
from duq.compiler.quant import LinearPack, LinearTransform, Quantization, fake_quantize, load_recipe
from duq.compiler.quant.calibrate import InputStatistics
from duq.compiler.quant.linears import GEMMA_LINEARS, input_group
from duq.compiler.quant.quantize import quantize_weights
from duq.plugins.errors import DuqError
from duq.runtime.command_line import progress_bar
from duq.tools import gemma3
from duq.tools.figures import Divergence, check_figure, draw_divergence

Packs = dict[str, LinearPack]
Transforms = dict[str, LinearTransform]


@dataclass(frozen=True)
class Scheme:
    """Recipe settings; and the transforms made from the packs of the original scheme, where it is not the recipe's to."""

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    transforms: Callable[[Packs], Transforms] | None = None


@dataclass
class Quality:
    """What is left of the model on the evaluation text."""

    perplexity: float
    kl: float = 0.0  # mean over the tokens of KL(fp32 || quantized), nats
    top1: float = 1.0  # share of the tokens for which both predict the same next one
    sqnr_db: float = math.inf  # mean over the linears, on calibration rows which the weights were not fitted to
    seconds: float = 0.0  # to quantize


class FoldedScale(LinearTransform):
    """x' / s_a and W' s_a: the exact integer form of a static scale for each channel. ``rotation`` is R / s_a."""

    def transform_weight(self, weight: Tensor) -> Tensor:
        inverse_squares = torch.from_numpy(self.rotation).square().sum(1).flatten()  # the columns of R have length 1
        return super().transform_weight(weight) / inverse_squares


def no_transforms(packs: Packs) -> Transforms:
    return {name: LinearTransform() for name in packs}


def same_transforms(packs: Packs) -> Transforms:
    return {name: LinearTransform(**pack.parts()) for name, pack in packs.items()}


def folded_scales(packs: Packs) -> Transforms:
    def folded(pack: LinearPack) -> LinearTransform:
        assert pack.activation_scale is not None  # the original scheme's is static
        scale = pack.activation_scale.reshape(-1, 1, pack.block_size)
        return FoldedScale(**pack.parts() | {"rotation": pack.rotation / scale})

    return {name: folded(pack) for name, pack in packs.items()}


PER_TENSOR = {"activation_scale": "per-tensor"}
PLAIN = {"compensate": False}
DUQUANT = {"scheme": "duquant"}
SCHEMES = {
    "reference": Scheme("original fake quantization", {"scheme": "reference"}),
    "reference-folded": Scheme("- its scales folded into W", DUQUANT | PER_TENSOR, folded_scales),
    "reference-per-tensor": Scheme("- its transforms, per tensor", DUQUANT | PER_TENSOR, same_transforms),
    "reference-per-token": Scheme("- its transforms, per token", DUQUANT, same_transforms),
    "bare": Scheme("no transform", DUQUANT | {"row_rotation": "0"}, no_transforms),
    "duquant-per-tensor": Scheme("duquant, per tensor", DUQUANT | PER_TENSOR),
    "duquant": Scheme("duquant", DUQUANT),
    "duquant-64": Scheme("duquant, block 64", DUQUANT | {"block_size": 64}),
    "balanced-per-tensor": Scheme("balanced, per tensor", PLAIN | PER_TENSOR),
    "balanced": Scheme("balanced", PLAIN),
    "balanced-16": Scheme("- block 16", PLAIN | {"block_size": 16}),
    "balanced-128": Scheme("- block 128", PLAIN | {"block_size": 128}),
    "balanced-permuted": Scheme("- permuted", PLAIN | {"permute": True}),
    "balanced-compensated": Scheme("- compensated (default)", {"compensate": True}),
    "balanced-w4a16": Scheme("- W4A16", PLAIN | {"activation_bits": 0}),
    "balanced-w8a8": Scheme("- W8A8", PLAIN | {"weight_bits": 8}),
}


class Study:
    """Gemma 3 270M in fp32, calibrated, with what it makes of the evaluation text."""

    def __init__(self, tokens: tuple[int, int], other_text: Path | None, progress: Progress):
        """tokens: to calibrate on and to evaluate on. other_text: to evaluate on, in place of the manual."""
        self.progress = progress
        task = progress.add_task("Reading the model", total=3)
        peer, file = gemma3.load_peer()
        self.model = gemma3.Gemma3(peer)
        progress.advance(task)
        tokenizer = gemma3.load_tokenizer(file)
        progress.advance(task)
        calibration, self.evaluation = samples(tokenizer, manual(), self.model.context, *tokens)
        if other_text is not None:
            (self.evaluation,) = samples(tokenizer, other_text.read_text(), self.model.context, tokens[1])
        verify(self.model, peer, self.evaluation[0])
        progress.advance(task)
        self.linears = [f"llm.layers.{i}.{leaf}" for i in range(self.model.config.depth) for leaf in GEMMA_LINEARS]
        self.statistics = calibrate(self.model, self.linears, progress.track(calibration, description="Calibrating"))
        self.hidden = [self.model(window) for window in progress.track(self.evaluation, description="Running fp32")]

    def quantize(self, scheme: Scheme) -> Quantization:
        """All linears of all layers."""
        recipe = load_recipe("all", scheme.settings, environment={})
        transforms = scheme.transforms and scheme.transforms(self.reference_packs)
        weights = {f"{name}.weight": self.model.get_parameter(f"{name}.weight") for name in self.linears}
        bits = dict.fromkeys(self.linears, recipe.weight_bits)
        config: Any = SimpleNamespace(
            llm=self.model.config, expert=self.model.config
        )  # no expert, that is: one with no weights
        return quantize_weights(weights, config, recipe, bits, self.statistics, self.progress, transforms)

    @cached_property
    def reference_packs(self) -> Packs:
        return self.quantize(SCHEMES["reference"]).packs

    def measure(self, scheme: Scheme) -> Quality:
        started = time.perf_counter()
        quantization = self.quantize(scheme)
        seconds = time.perf_counter() - started
        sqnr_db = sum(pack.sqnr_db for pack in quantization.packs.values()) / len(quantization.packs)
        return self.compare(fake_quantize(self.model, quantization), sqnr_db=sqnr_db, seconds=seconds)

    def compare(self, quantized: nn.Module, **known: float) -> Quality:
        """The quality of ``quantized``, to which ``known`` measures are added."""
        sums = torch.zeros(3, dtype=torch.float64)  # of -log p(next token), KL, and agreement
        windows = list(zip(self.evaluation, self.hidden, strict=True))
        for window, hidden in self.progress.track(windows, description="Evaluating"):
            parts = (window[0, 1:], hidden[0, :-1], quantized(window)[0, :-1])
            for following, reference, found in zip(*(part.split(gemma3.LOGIT_ROWS) for part in parts), strict=True):
                reference, found = (self.model.logits(h).log_softmax(-1) for h in (reference, found))
                divergence = F.kl_div(found, reference, reduction="sum", log_target=True)
                agreement = (found.argmax(-1) == reference.argmax(-1)).sum()
                sums += torch.stack((F.nll_loss(found, following, reduction="sum"), divergence, agreement))
        loss, kl, top1 = (sums / sum(len(window[0]) - 1 for window in self.evaluation)).tolist()
        return Quality(math.exp(loss), kl, top1, **known)


def manual() -> str:
    """The Python reference manual as CPython ships it, for pydoc: some 100,000 tokens of English prose."""
    return "\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))


def samples(tokenizer, text: str, context: int, *tokens: int) -> list[list[Tensor]]:
    """Disjoint samples of ``text``, of about so many ``tokens`` each, in windows [1, context] from all over it."""
    pieces = torch.tensor(tokenizer.encode(text)).unfold(0, context - 1, context - 1)
    counts = [max(1, count // context) for count in tokens]
    if sum(counts) > len(pieces):
        raise DuqError(f"the text has {pieces.numel()} tokens; ask for fewer than {sum(tokens)}")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[: sum(counts)]
    return [[F.pad(pieces[i], (1, 0), value=gemma3.BOS)[None] for i in part] for part in order.split(counts)]


def verify(model: gemma3.Gemma3, peer: nn.Module, window: Tensor) -> None:
    """Raises DuqError unless ``model`` is transformers' model: logits of some hundred tokens equal to 1e-4."""
    expected = peer(window).logits
    error = (model.logits(model(window)) - expected).abs().max() / expected.abs().max()
    if not error < 1e-4:
        raise DuqError(f"tools/gemma3.py is not the Gemma 3 of transformers: logits differ by {error:.1e} of the largest")


def calibrate(model: nn.Module, linears: list[str], windows: Iterable[Tensor]) -> dict[str, InputStatistics]:
    """Statistics of the inputs of ``linears`` by input group, as compiler.quant.calibrate collects them from a policy."""
    statistics: dict[str, InputStatistics] = {}

    def observer(group: str) -> Callable:
        def observe(module: nn.Module, inputs: tuple[Tensor]) -> None:
            channels = inputs[0].shape[-1]
            statistics.setdefault(group, InputStatistics(channels, seed=len(statistics))).observe(
                inputs[0].view(-1, channels)
            )

        return observe

    first_of_group = {input_group(name): name for name in reversed(linears)}
    handles = [model.get_submodule(n).register_forward_pre_hook(observer(g)) for g, n in first_of_group.items()]
    for window in windows:
        model(window)
    for handle in handles:
        handle.remove()
    return statistics


@torch.no_grad()
def study(
    schemes: list[str] | None,
    *,
    calibration_tokens: int,
    evaluation_tokens: int,
    evaluation_text: Path | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """What duq-study-schemes does, with its options by name."""
    chosen = schemes or list(SCHEMES)
    for key in chosen:
        if key not in SCHEMES:
            raise DuqError(f"there is no scheme {key!r}; choose from {', '.join(SCHEMES)}")
    if plot is not None:
        check_figure("--plot", plot)
    if evaluation_text is not None and not evaluation_text.is_file():
        raise DuqError(f"--evaluation-text {evaluation_text}: no such file")
    with progress_bar() as progress:
        overall = progress.add_task("Schemes", total=len(chosen))
        study = Study((calibration_tokens, evaluation_tokens), evaluation_text, progress)
        found = {"fp32": study.compare(study.model)}
        for key in chosen:
            for task in set(progress.task_ids) - {overall}:
                progress.remove_task(task)
            found[key] = study.measure(SCHEMES[key])
            progress.advance(overall)
    if plot is not None:
        draw_divergence(divergences(found), plot)
    typer.echo(to_json(found)) if as_json else Console().print(table(found))


def table(found: dict[str, Quality]) -> Table:
    shown = Table(title="Gemma 3 270M, all 126 linears quantized", title_justify="left")
    shown.add_column("scheme", no_wrap=True)
    shown.add_column()
    for column in ("perplexity", "KL", "top-1 %", "SQNR dB", "s"):
        shown.add_column(column, justify="right", no_wrap=True)
    for key, q in found.items():
        numbers = f"{q.perplexity:.2f}", f"{q.kl:.3f}", f"{100 * q.top1:.1f}", f"{q.sqnr_db:.1f}", f"{q.seconds:.0f}"
        shown.add_row(key, title(key), *numbers)
    return shown


def title(key: str) -> str:
    return SCHEMES[key].title if key in SCHEMES else ""


def to_json(found: dict[str, Quality]) -> str:
    versions = {"duq": duq.__version__, "python": platform.python_version(), "torch": torch.__version__}
    schemes = {key: {"title": title(key), **asdict(quality)} for key, quality in found.items()}
    return json.dumps({"created_by": versions, "schemes": schemes}, indent=2).replace("Infinity", "null")


def divergences(found: dict[str, Quality]) -> list[Divergence]:
    """What the figure shows of each scheme; fp32 has none."""
    return [Divergence(key, q.kl, q.perplexity, key.startswith("balanced")) for key, q in found.items() if key != "fp32"]
