"""Named phases of passes. A pass says why it is there, what has to run before it, and how often it must match.

A pass whose pattern is no longer in the graph would leave a plan that is slower and otherwise right, and a new PyTorch may
export another graph at any time. So how often a pass matches is compared with a number that follows from the policy's
dimensions and from what is quantized (compiler/graph/counts.py), and any difference ends the compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from duq.compiler.errors import GraphError
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.weights import check_records

Rewrite = Callable[[Graphs], int]  # changes the graphs in place; returns how often its pattern matched
Count = Callable[[Graphs], int]  # of the policy's config and quantization, never of the graphs themselves


@dataclass(frozen=True)
class Pass:
    """One exact rewrite of both graphs (quantization and the solver aside).

    Attributes:
        why: one line, also for the error when it does not match.
        matches: how often it must match for this policy.
        needs: rewrites that have to run before.
    """

    rewrite: Rewrite
    why: str
    matches: Count
    needs: tuple[Rewrite, ...] = ()

    @property
    def name(self) -> str:
        return self.rewrite.__name__

    def run(self, graphs: Graphs) -> None:
        """Rewrites the graphs in place. GraphError names the pass if it does not match as often as it must."""
        try:
            found, expected = self.rewrite(graphs), self.matches(graphs)
            for _, model in graphs.items():
                check_records(model)
        except GraphError as error:
            raise GraphError(f"pass {self.name} ({self.why}): {error}") from error
        if found != expected:
            raise GraphError(
                f"pass {self.name} ({self.why}) matched {found} times instead of {expected}: "
                "was PyTorch or compiler/model changed?"
            )


@dataclass(frozen=True)
class Phase:
    name: str
    passes: tuple[Pass, ...]


def rewrite(graphs: Graphs, phases: Iterable[Phase]) -> None:
    """Runs every pass, in place. GraphError as `Pass.run`."""
    for each in passes_of(phases):
        each.run(graphs)


def passes_of(phases: Iterable[Phase]) -> Iterator[Pass]:
    return (each for phase in phases for each in phase.passes)


def check_order(phases: Iterable[Phase]) -> None:
    """ValueError if a pass comes twice, or before one that it needs."""
    done: set[Rewrite] = set()
    for each in passes_of(phases):
        missing = [need.__name__ for need in each.needs if need not in done]
        if missing or each.rewrite in done:
            raise ValueError(f"pass {each.name} " + (f"needs {', '.join(missing)} before it" if missing else "comes twice"))
        done.add(each.rewrite)
