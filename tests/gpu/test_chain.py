"""Chains on a GPU: a layer of the expert as one launch, bit for bit what its kernels compute one after the other."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layer import chains, chosen_for, layers_of, result
from duq.plugins.gpu import GPUS
from tests.support import launch

PROGRAMS = [sm for sm in (80, 86, 89, 120) if not GPUS[sm].has_pdl]
LAYERS, ROUNDS = 3, 20


@pytest.mark.parametrize("sm", PROGRAMS)
@pytest.mark.parametrize("past", [817, 300])
def test_a_chain_is_what_its_kernels_are(sm, past):
    """Twice: each chain clears the counters of the one ahead."""
    with launch.program(sm) as image:
        tactics = chosen_for(image.gpu, past)
        layers, shared = layers_of(past, LAYERS)
        expected = result(shared, lambda: [call() for layer in layers for call in layer.launches(tactics).values()])
        made = chains(layers, tactics)
        for _ in range(2):
            found = result(shared, lambda: [launch.run(*each) for each in made])
            assert all(map(torch.equal, found, expected))
        assert torch.isfinite(expected[0]).all() and expected[0].std() > 0


def test_chains_beside_each_other_go_on():
    """On streams of their own, whose blocks do not fit on the GPU together; each comes to what it comes to alone."""
    with launch.program(86) as image:
        works = []
        for _ in range(5):
            with launch.meeting_places():
                layers, shared = layers_of(count=LAYERS)
                works.append((chains(layers, chosen_for(image.gpu)), shared, torch.cuda.Stream()))
        torch.cuda.synchronize()

        def run(together: list) -> None:
            for made, _, stream in together * ROUNDS:
                with torch.cuda.stream(stream):
                    for each in made:
                        launch.run(*each)
            torch.cuda.synchronize()

        run(works[:1])
        run(works[1:])
        alone, *others = (shared["x"] for _, shared, _ in works)
        assert torch.isfinite(alone).all() and all(torch.equal(each, alone) for each in others)
