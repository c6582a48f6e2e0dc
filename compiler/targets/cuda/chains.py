"""Chains: the launches of a step that follow each other, a layer at a time, as one launch, on GPUs without programmatic launch.

They mean what they mean one by one, and read and write the same buffers: each part waits until the one ahead has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from duq.compiler.targets.cuda.launches import BYTES, Buffer, Chain, Launch, Pointer, Program
from duq.plugins.gpu import Gpu
from duq.plugins.kernels import chain


def with_chains(program: Program, gpu: Gpu) -> Program:
    """The program with the chains of its step: none where kernels overlap anyway, or where no layers repeat."""
    runs = [] if gpu.has_pdl else _runs(program.step, gpu)
    if len(runs) < 2:  # each clears the counters of the one ahead
        return program
    spaces = chain.MOST_PARTS * BYTES["int"]
    links = Buffer("links", len(runs) * spaces, persistent=True)
    chains = []
    for number, run in enumerate(runs):
        parts = [launch.instance for launch in program.step[run.start : run.stop]]
        own, ahead = (Pointer(links, "int", index % len(runs) * spaces) for index in (number, number - 1))
        instance = chain.chain(parts, chain.residents(parts, gpu))
        chains.append(Chain(run.start, run.stop - 1, instance, own, ahead))
    return replace(program, zeroed=[*program.zeroed, links], chains=chains)


def _runs(step: Sequence[Launch], gpu: Gpu) -> list[range]:
    """Where launches that other layers have too follow each other, each kernel at most once."""
    times = Counter(launch.instance.code for launch in step)
    runs, start = [], 0
    for index, launch in enumerate([*step, None]):
        run, code = step[start:index], launch and launch.instance.code
        can_be_part = launch is not None and times[launch.instance.code] > 1 and chain.fits(launch.instance, gpu)
        if can_be_part and len(run) < chain.MOST_PARTS and all(each.instance.code != code for each in run):
            continue
        if len(run) > 1:
            runs.append(range(start, index))
        start = index if can_be_part else index + 1
    return runs
