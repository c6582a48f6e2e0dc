"""Tensor shapes <-> dimensions: a policy's dimensions are read off its tensors, and imply every tensor it must have."""

from __future__ import annotations

import math
import re
from collections import Counter

from duq.compiler.errors import CheckpointError
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig
from duq.runtime.reading import brief_text

Shapes = dict[str, tuple[int, ...]]

HEAD_DIM = 256  # every published Gemma of pi0 / pi0.5; only openpi's "dummy" differs
VISION_HEAD_DIM = 72  # So400m/14
PROMPT_SLOTS = {False: 48, True: 200}  # by "is it pi0.5": openpi's and LeRobot's default
ACTION_HORIZON = 50  # likewise, of both policies
LISTED = 20  # faults printed before "... and N more"


def expected_shapes(config: ModelConfig) -> Shapes:
    """Canonical name -> shape of every tensor of a policy with these dimensions."""
    vision, width, action_dim = config.vision, config.expert.width, config.action_dim
    shapes = _siglip_shapes(vision)
    shapes |= _linear("projector", config.llm.width, vision.width)
    shapes["llm.embed_tokens.weight"] = (config.vocab_size, config.llm.width)
    shapes |= _gemma_shapes("llm", config.llm, adaptive_norm=False)
    shapes |= _gemma_shapes("expert", config.expert, adaptive_norm=config.pi05)
    shapes |= _linear("action_in_proj", width, action_dim) | _linear("action_out_proj", action_dim, width)
    if config.pi05:
        shapes |= _linear("time_mlp_in", width, width) | _linear("time_mlp_out", width, width)
    else:
        shapes |= _linear("state_proj", width, config.state_width)
        shapes |= _linear("action_time_mlp_in", width, 2 * width) | _linear("action_time_mlp_out", width, width)
    return shapes


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _siglip_shapes(vision: VisionConfig) -> Shapes:
    width, patch = vision.width, vision.patch_size
    shapes: Shapes = {
        "vision.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision.embeddings.patch_embedding.bias": (width,),
        "vision.embeddings.position_embedding.weight": (vision.tokens, width),
    }
    for i in range(vision.depth):
        layer = f"vision.encoder.layers.{i}"
        shapes |= _layer_norm(f"{layer}.layer_norm1", width) | _layer_norm(f"{layer}.layer_norm2", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{projection}", width, width)
        shapes |= _linear(f"{layer}.mlp.fc1", vision.mlp_width, width)
        shapes |= _linear(f"{layer}.mlp.fc2", width, vision.mlp_width)
    return shapes | _layer_norm("vision.post_layernorm", width)


def _gemma_shapes(stack: str, gemma: GemmaConfig, adaptive_norm: bool) -> Shapes:
    width, query, key = gemma.width, gemma.heads * gemma.head_dim, gemma.kv_heads * gemma.head_dim

    def norm(name: str) -> Shapes:
        # adaRMS: the time embedding gives scale, shift and gate
        return _linear(f"{name}.dense", 3 * width, width) if adaptive_norm else {f"{name}.weight": (width,)}

    shapes: Shapes = {}
    for i in range(gemma.depth):
        layer = f"{stack}.layers.{i}"
        shapes |= norm(f"{layer}.input_layernorm")
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (query, width),
            f"{layer}.self_attn.k_proj.weight": (key, width),
            f"{layer}.self_attn.v_proj.weight": (key, width),
            f"{layer}.self_attn.o_proj.weight": (width, query),
        }
        shapes |= norm(f"{layer}.post_attention_layernorm")
        shapes |= {
            f"{layer}.mlp.gate_proj.weight": (gemma.mlp_width, width),
            f"{layer}.mlp.up_proj.weight": (gemma.mlp_width, width),
            f"{layer}.mlp.down_proj.weight": (width, gemma.mlp_width),
        }
    return shapes | norm(f"{stack}.norm")


def infer_config(
    shapes: Shapes, vision_heads: int | None, action_horizon: int, max_prompt_tokens: int | None
) -> ModelConfig:
    """The dimensions of the policy these tensors (canonical name -> shape) belong to.

    What tensors cannot tell is passed in: the heads of a SigLIP whose width is no multiple of 72, the action
    horizon, and the number of prompt tokens (None: 48 for pi0, 200 for pi0.5).
    Raises CheckpointError when a tensor that carries a dimension is absent or of the wrong rank.
    """
    pi05 = _is_pi05(shapes)
    width, _, patch, _ = _typical(shapes, "vision.embeddings.patch_embedding.weight", 4)
    tokens, _ = _typical(shapes, "vision.embeddings.position_embedding.weight", 2)
    mlp_width, _ = _typical(shapes, "vision.encoder.layers.*.mlp.fc1.weight", 2)
    vocab_size, _ = _typical(shapes, "llm.embed_tokens.weight", 2)
    _, action_dim = _typical(shapes, "action_in_proj.weight", 2)
    _, state_dim = (None, action_dim) if pi05 else _typical(shapes, "state_proj.weight", 2)
    config = ModelConfig(
        pi05=pi05,
        vision=VisionConfig(
            width=width,
            depth=_depth(shapes, "vision.encoder.layers."),
            mlp_width=mlp_width,
            heads=_vision_heads(width, vision_heads),
            image_size=math.isqrt(tokens) * patch,
            patch_size=patch,
        ),
        llm=_infer_gemma(shapes, "llm"),
        expert=_infer_gemma(shapes, "expert"),
        vocab_size=vocab_size,
        action_dim=action_dim,
        action_horizon=action_horizon,
        max_prompt_tokens=max_prompt_tokens or PROMPT_SLOTS[pi05],
        state_dim=None if state_dim == action_dim else state_dim,
    )
    _check_joint_attention(config)
    return config


def _is_pi05(shapes: Shapes) -> bool:
    """pi0.5 conditions every expert norm on time and has no state token; no flag in the files says which it is."""
    pi0 = sorted({name.split(".")[0] for name in shapes if name.startswith(("state_proj.", "action_time_mlp_"))})
    pi05 = sorted({name.split(".")[0] for name in shapes if name.startswith("time_mlp_")})
    if bool(pi0) == bool(pi05):
        raise CheckpointError(
            "cannot tell pi0 from pi0.5: pi0 has state_proj and action_time_mlp_in/out, pi0.5 has time_mlp_in/out; "
            f"found {', '.join(pi0 + pi05) or 'none of them'}"
        )
    return bool(pi05)


def _typical(shapes: Shapes, pattern: str, rank: int) -> tuple[int, ...]:
    """The commonest shape among the tensors that match ("*" is a layer number).

    The majority, so that one mis-shaped layer is reported as the wrong one and not all the others.
    """
    regex = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    found = Counter(shape for name, shape in shapes.items() if regex.fullmatch(name) and len(shape) == rank)
    if not found:
        raise CheckpointError(f"no tensor {pattern} with {rank} dimensions; the policy's dimensions are read off it")
    return found.most_common(1)[0][0]


def _depth(shapes: Shapes, prefix: str) -> int:
    """How many layers there are, whatever their numbers: a gap shows up as missing and extra tensors."""
    numbers = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in shapes)
    return len({number[1] for number in numbers if number})


def _vision_heads(width: int, explicit: int | None) -> int:
    heads = explicit or (width // VISION_HEAD_DIM if width % VISION_HEAD_DIM == 0 else None)
    if heads is None:
        raise CheckpointError(
            f"the heads of a SigLIP of width {width} cannot be inferred (it is no multiple of {VISION_HEAD_DIM}); "
            'add "vision": {"heads": N} to config.json'
        )
    if width % heads:
        raise CheckpointError(f'config.json: "vision": {{"heads": {heads}}} does not divide the SigLIP width {width}')
    return heads


def _infer_gemma(shapes: Shapes, stack: str) -> GemmaConfig:
    layers = f"{stack}.layers.*"
    query, width = _typical(shapes, f"{layers}.self_attn.q_proj.weight", 2)
    key, _ = _typical(shapes, f"{layers}.self_attn.k_proj.weight", 2)
    mlp_width, _ = _typical(shapes, f"{layers}.mlp.gate_proj.weight", 2)
    head_dim = HEAD_DIM if key % HEAD_DIM == 0 else key  # openpi's "dummy": one key/value head of 16
    return GemmaConfig(
        width=width,
        depth=_depth(shapes, f"{stack}.layers."),
        mlp_width=mlp_width,
        heads=query // head_dim,
        kv_heads=key // head_dim,
        head_dim=head_dim,
    )


def _check_joint_attention(config: ModelConfig) -> None:
    """Layer i of the expert attends to the keys and values of layer i of the LLM, so these must agree."""
    for field in ("depth", "kv_heads", "head_dim"):
        llm, expert = getattr(config.llm, field), getattr(config.expert, field)
        if llm != expert:
            raise CheckpointError(
                f"the LLM has {field} {llm} but the action expert {expert}: they attend to each other layer by layer"
            )


def check_shapes(found: Shapes, expected: Shapes) -> None:
    """Raises CheckpointError that lists every missing, extra and mis-shaped tensor (canonical names)."""
    faults = [f"missing    {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    faults += [
        f"mis-shaped {name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults += [f"extra      {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    if faults:
        raise CheckpointError(f"{len(faults)} tensors do not fit the policy:\n{listing(faults)}")


def listing(lines: list[str]) -> str:
    """The first lines, indented one to a line, and how many were left out."""
    shown = [f"  {brief_text(line)}" for line in lines[:LISTED]]
    if len(lines) > LISTED:
        shown.append(f"  ... and {len(lines) - LISTED} more")
    return "\n".join(shown)
