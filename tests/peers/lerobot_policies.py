"""Saves small pi0 and pi0.5 policies of LeRobot's own classes as its trainer does, untrained, and records what they do.

Each case is a folder of its own: `pretrained_model/` (written by `save_pretrained`, with its pipelines), raw observations
as a robot gives them, the noise, and the actions that LeRobot's preprocessor, policy and postprocessor return for them.
tests/peers/check_policies.py compiles every folder and compares. LeRobot's code runs as published; only its hard-coded
sizes are replaced, and its tokenizer by a small one, for PaliGemma's cannot be shipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.pi0 import PI0Config, modeling_pi0, processor_pi0
from lerobot.policies.pi05 import PI05Config, modeling_pi05, processor_pi05
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import tokenizer_processor

sys.path.insert(0, str(Path(__file__).parent))

from lerobot_actions import small_gemma, small_paligemma
from policy_cases import LLM, VISION, VOCAB_SIZE, weight

HORIZON = 8
NAMES = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]


@dataclass
class Case:
    """One policy. images: camera -> height and width; constant: dims of state and actions that never change."""

    kind: str = "pi0"
    dims: int = 6
    images: dict = field(default_factory=lambda: {"front": (256, 256), "wrist": (256, 256)})
    modes: tuple[str, str] = ("", "")  # of state and actions; "": the policy's own
    dtype: str = "float32"
    constant: tuple[int, ...] = ()
    steps: int = 10
    empty_cameras: int = 0
    relative: bool = False
    names: bool = True
    rename: dict = field(default_factory=dict)
    adapter: bool = False
    missing: tuple[str, ...] = ()  # cameras that the observation lacks
    tasks: tuple[str, ...] = ("pick up the red block", "Stack_the cubes ", "wipe\n")


CASES = {
    "pi0": Case(),
    "pi0 min-max, constant joints, 480 x 640": Case(
        modes=("MIN_MAX", "MIN_MAX"),
        dims=14,
        constant=(3, 13),
        images={"top": (480, 640), "left": (480, 640), "a": (480, 640)},
    ),
    "pi0 quantile10, relative, wrist first": Case(
        modes=("QUANTILE10", "QUANTILE10"), relative=True, images={"wrist": (224, 224), "top": (120, 90)}, constant=(0,)
    ),
    "pi0 quantiles and identity, three steps": Case(modes=("QUANTILES", "IDENTITY"), steps=3, dims=7),
    "pi0 empty camera, one missing": Case(empty_cameras=1, images={"b": (224, 224), "a": (224, 224)}, missing=("b",)),
    "pi0 constant joints, mean and std": Case(
        constant=(1, 4), rename={"observation.images.cam": "observation.images.front"}
    ),
    "pi0 bfloat16": Case(dtype="bfloat16"),
    "pi0 adapter": Case(adapter=True),
    "pi05": Case("pi05"),
    "pi05 min-max, 14 dims": Case("pi05", modes=("MIN_MAX", "MIN_MAX"), dims=14, images={"top": (480, 640)}, constant=(2,)),
    "pi05 mean and std, relative": Case("pi05", modes=("MEAN_STD", "MEAN_STD"), relative=True, names=False),
    "pi05 constant joints, five steps": Case("pi05", constant=(0, 5), steps=5, images={"z": (256, 256), "a": (200, 320)}),
    "pi05 bfloat16": Case("pi05", dtype="bfloat16"),
    "pi05 adapter": Case("pi05", adapter=True),
}
CLASSES = {
    "pi0": (PI0Config, modeling_pi0, modeling_pi0.PI0Policy, processor_pi0.make_pi0_pre_post_processors),
    "pi05": (PI05Config, modeling_pi05, modeling_pi05.PI05Policy, processor_pi05.make_pi05_pre_post_processors),
}


class SmallTokenizer:
    """What LeRobot asks of a Hugging Face tokenizer, from a SentencePiece model, whose tokens PaliGemma's would be."""

    def __init__(self, file: Path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))

    def __call__(self, text, max_length, truncation, padding, padding_side, return_tensors):
        rows = [[self.model.bos_id(), *self.model.encode(each)][:max_length] for each in text]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


def statistics(dims: int, constant: tuple[int, ...], random: np.random.RandomState) -> dict:
    """As LeRobot's datasets have them, float32; a constant dim has no spread."""
    values = random.standard_normal((400, dims)) * random.uniform(0.2, 2, dims) + random.uniform(-1, 1, dims)
    values[:, list(constant)] = values[0, list(constant)]
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    found |= {f"q{q:02d}": np.quantile(values, q / 100, axis=0) for q in (1, 10, 90, 99)}
    found["std"][list(constant)] = 0.0
    for name in ("max", "q01", "q10", "q90", "q99", "mean"):
        found[name][list(constant)] = found["min"][list(constant)]
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in found.items()}


def make_config(case: Case):
    config_class = CLASSES[case.kind][0]
    state, action = (getattr(NormalizationMode, mode) if mode else None for mode in case.modes)
    config = config_class(
        dtype=case.dtype, chunk_size=HORIZON, n_action_steps=HORIZON, num_inference_steps=case.steps,
        empty_cameras=case.empty_cameras, use_relative_actions=case.relative, device="cpu",
    )  # fmt: skip
    modes = config.normalization_mapping
    config.normalization_mapping = {
        "VISUAL": NormalizationMode.IDENTITY, "STATE": state or modes["STATE"], "ACTION": action or modes["ACTION"]
    }  # fmt: skip
    shapes = {f"observation.images.{name}": (3, *size) for name, size in case.images.items()}
    config.input_features = {key: PolicyFeature(FeatureType.VISUAL, shape) for key, shape in shapes.items()}
    config.input_features["observation.state"] = PolicyFeature(FeatureType.STATE, (case.dims,))
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (case.dims,))}
    if case.names:
        config.action_feature_names = [f"{name}.{index // 6}.pos" for index, name in enumerate((NAMES * 3)[: case.dims])]
    return config


def make_policy(case: Case):
    """LeRobot's policy with made weights and small sizes."""
    _, module, policy_class, _ = CLASSES[case.kind]
    module.get_gemma_config = lambda variant: small_gemma(module, variant)
    module.CONFIG_MAPPING = {"paligemma": small_paligemma, "gemma": MAPPING["gemma"]}
    policy = policy_class(make_config(case)).eval()
    paligemma = policy.model.paligemma_with_expert.paligemma.model
    dtype = paligemma.multi_modal_projector.linear.weight.dtype
    paligemma.multi_modal_projector.linear = torch.nn.Linear(VISION["width"], LLM["width"]).to(dtype)
    embedding = paligemma.language_model.embed_tokens
    embedding.weight = torch.nn.Parameter(embedding.weight[:VOCAB_SIZE].detach().clone())
    head = policy.model.paligemma_with_expert.paligemma.lm_head
    head.weight = embedding.weight
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lm_head" not in name:
                parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))).to(parameter.dtype))
    return policy


MAPPING = (
    dict(modeling_pi0.CONFIG_MAPPING.items())
    if hasattr(modeling_pi0.CONFIG_MAPPING, "items")
    else modeling_pi0.CONFIG_MAPPING
)


def observations(case: Case, stats: dict, random: np.random.RandomState) -> list[dict]:
    """Raw, as a robot gives them: uint8 [H, W, 3] and float32. The constant joints have the value that they always have."""
    back = {new: old for old, new in case.rename.items()}
    found = []
    for task in case.tasks:
        state = (stats["mean"].numpy() + random.standard_normal(case.dims) * stats["std"].numpy()).astype(np.float32)
        state[list(case.constant)] = stats["min"].numpy()[list(case.constant)]
        images = {}
        for name, (height, width) in case.images.items():
            if name not in case.missing:
                small = random.randint(0, 256, (12, 16, 3)).astype(np.float32)
                image = torch.nn.functional.interpolate(
                    torch.from_numpy(small).permute(2, 0, 1)[None], (height, width), mode="bicubic"
                )
                key = f"observation.images.{name}"
                images[back.get(key, key)] = image[0].permute(1, 2, 0).clamp(0, 255).byte().numpy()
        found.append({**images, "observation.state": state, "task": task})
    return found


def folder_name(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")


def build(name: str, case: Case, tokenizer: Path) -> tuple:
    """The policy, its two pipelines, its statistics, and the random numbers that go on from there."""
    tokenizer_processor.AutoTokenizer = type("None", (), {"from_pretrained": staticmethod(lambda name: None)})
    random = np.random.RandomState(sum(map(ord, name)))
    stats = {
        "observation.state": statistics(case.dims, case.constant, random),
        "action": statistics(case.dims, case.constant, random),
    }
    policy = make_policy(case)
    before, after = CLASSES[case.kind][3](policy.config, stats)
    for step in before.steps:
        if hasattr(step, "rename_map"):
            step.rename_map = case.rename
        if type(step).__name__ == "TokenizerProcessorStep":
            step.tokenizer = step.input_tokenizer = SmallTokenizer(tokenizer)
    return policy, before, after, stats, random


def record(name: str, case: Case, tokenizer: Path, out: Path) -> None:
    policy, before, after, stats, random = build(name, case, tokenizer)
    folder = out / folder_name(name)
    model = folder / "pretrained_model"
    if case.adapter:
        policy = with_adapter(policy, folder / "base")
    policy.save_pretrained(model)
    if case.adapter:
        policy.base_model.model.config.save_pretrained(model)
    before.save_pretrained(model, config_filename="policy_preprocessor.json")
    after.save_pretrained(model, config_filename="policy_postprocessor.json")
    for directory in (model, folder / "base"):
        if (directory / "config.json").exists():
            fit_sizes(directory / "config.json")
    (model / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    raw = observations(case, stats["observation.state"], random)
    noise = random.standard_normal((len(raw), HORIZON, 32)).astype(np.float32)
    actions = []
    for each, start in zip(raw, noise, strict=True):
        batch = prepare_observation_for_inference(
            {k: v for k, v in each.items() if k != "task"}, torch.device("cpu"), each["task"]
        )
        with torch.no_grad():
            chunk = policy.predict_action_chunk(before(batch), noise=torch.from_numpy(start)[None])
        actions.append(after(chunk)[0].float().numpy())
    np.savez(folder / "calls.npz", noise=noise, actions=np.stack(actions), tasks=np.array(case.tasks))
    for index, each in enumerate(raw):
        np.savez(folder / f"observation_{index}.npz", **{k: v for k, v in each.items() if k != "task"})
    print(f"{name}: {np.stack(actions).shape}")


def with_adapter(policy, base: Path):
    """LeRobot's default LoRA, with made weights, over a base of its own."""
    from peft import LoraConfig

    policy.save_pretrained(base)
    policy.config.pretrained_path = base
    targets = policy._get_default_peft_targets()
    adapted = policy.wrap_with_peft(LoraConfig(r=4, lora_alpha=12, **targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return adapted.eval()


def fit_sizes(file: Path) -> None:
    """config.json names the variants whose sizes were replaced: without them, duq reads the sizes off the tensors."""
    data = json.loads(file.read_text())
    for key in ("paligemma_variant", "action_expert_variant"):
        data.pop(key, None)
    file.write_text(json.dumps(data | {"vision": {"heads": VISION["heads"]}}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    for name, case in CASES.items():
        record(name, case, arguments.tokenizer, arguments.out)


if __name__ == "__main__":
    main()
