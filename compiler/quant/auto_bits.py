"""Mixed bits: which linears are worth 8."""

from __future__ import annotations

from collections.abc import Mapping

from duq.compiler.quant.linears import input_group
from duq.compiler.quant.pack import LinearPack


def spend_bits(packs: Mapping[str, LinearPack], mean_bits: float) -> dict[str, int]:
    """Canonical name -> weight bits, so that the weights of all packs have at most `mean_bits` on average.

    A linear at 4 bits adds noise of 10^(-SQNR / 10) of its output's power, and next to none at 8. Linears that share their
    input are one product at run time, so they change together. Of these groups those that take away most noise for each
    bit they cost get 8 bits, as far as the bits reach; the measured SQNR of `packs` is that of the bits they have.
    """
    bits = {name: pack.weight_bits for name, pack in packs.items()}
    weights = {name: pack.shape[0] * pack.shape[1] for name, pack in packs.items()}
    groups: dict[str, list[str]] = {}
    for name in (name for name in packs if bits[name] == 4):
        groups.setdefault(input_group(name), []).append(name)

    def cost(members: list[str]) -> int:
        return sum(4 * weights[name] for name in members)

    def gain(members: list[str]) -> float:
        return sum(10 ** (-packs[name].sqnr_db / 10) for name in members)

    left = mean_bits * sum(weights.values()) - sum(bits[name] * weights[name] for name in packs)
    for members in sorted(groups.values(), key=lambda members: -gain(members) / cost(members)):
        if cost(members) <= left:
            left -= cost(members)
            bits |= dict.fromkeys(members, 8)
    return bits
