"""The solvers: textbook values on linear equations, the order of convergence, and the first steps."""

from __future__ import annotations

import numpy as np
import pytest

from duq.runtime.solver import SOLVERS, Solver

ORDERS = {"euler": 1, "ab2": 2, "ab3": 3}


def integrate(solver: Solver, velocity, x: float) -> list[float]:
    """The states from t = 1 to 0, in float64, written out as the definition is."""
    h, states, changes = 1 / solver.num_steps, [x], []
    for step, row in enumerate(solver.coefficients().astype(np.float64)):
        changes.append(-h * velocity(states[-1], 1 - step * h))
        states.append(states[-1] + sum(b * d for b, d in zip(row, reversed(changes), strict=False)))
    return states


def test_the_coefficients_are_the_textbooks():
    """Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, III.1."""
    np.testing.assert_array_equal(Solver("euler", 3).coefficients(), [[1]] * 3)
    np.testing.assert_array_equal(Solver("ab2", 3).coefficients(), [[1, 0], [1.5, -0.5], [1.5, -0.5]])
    last = Solver("ab3", 4).coefficients()[2:]
    np.testing.assert_allclose(12 * last, [[23, -16, 5]] * 2, rtol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_terms_are_those_that_integrate_polynomials_exactly(name):
    """The definition of Adams-Bashforth: exact where v is a polynomial in t of a degree below the order."""
    row = np.array(SOLVERS[name][-1])
    for degree in range(ORDERS[name]):
        earlier = np.array([float((-back) ** degree) for back in range(len(row))])  # t^degree at 0, -1, -2
        assert row @ earlier == pytest.approx(1 / (degree + 1))  # the integral from 0 to 1


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_every_row_is_consistent_and_the_first_is_eulers(name, num_steps):
    table = Solver(name, num_steps).coefficients()
    assert table.shape == (num_steps, ORDERS[name]) and table.dtype == np.float32
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-6)
    assert table[0, 0] == 1 and not table[0, 1:].any()
    assert Solver(name, num_steps).history == ORDERS[name] - 1


def test_two_steps_by_hand():
    """v = a x + b t from x = 1 in two steps of a half: x1 = 1 - (a + b) / 2; x2 = x1 - (3 v1 - v0) / 4."""
    a, b = 0.75, -0.25
    x1 = 1 - (a + b) / 2
    x2 = x1 - (3 * (a * x1 + b / 2) - (a + b)) / 4
    assert integrate(Solver("ab2", 2), lambda x, t: a * x + b * t, 1.0) == pytest.approx([1, x1, x2], rel=1e-12)


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_the_error_falls_with_the_order(name, order):
    """On v = a x + b t: x(t) = c e^(a t) - b t / a - b / a^2."""
    a, b, start = 1.5, 0.5, 1.0
    c = (start + b / a + b / a**2) / np.exp(a)
    exact = c - b / a**2
    errors = [abs(integrate(Solver(name, n), lambda x, t: a * x + b * t, start)[-1] - exact) for n in (80, 160)]
    # ab3 starts with one step of order 1 and one of order 2: their local errors, h^2 and h^3, remain.
    assert np.log2(errors[0] / errors[1]) == pytest.approx(min(order, 2), abs=0.1)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 10])
def test_velocities_are_found_again_from_the_states(name, num_steps):
    random, solver = np.random.default_rng(num_steps), Solver(name, num_steps)
    velocities = random.standard_normal((num_steps, 4, 3))
    states = [random.standard_normal((4, 3))]
    for step, row in enumerate(solver.coefficients().astype(np.float64)):
        earlier = [-velocities[step - back] / num_steps for back in range(min(len(row), step + 1))]
        states.append(states[-1] + sum(b * d for b, d in zip(row, earlier, strict=False)))
    np.testing.assert_allclose(solver.velocities(np.stack(states)), velocities, atol=1e-5)


def test_an_older_plan_is_eulers():
    assert Solver.of({"num_steps": 7}) == Solver("euler", 7)
    assert Solver.of({"num_steps": 5, "solver": "ab2"}) == Solver("ab2", 5)
    assert [str(Solver()), str(Solver("ab2", 1))] == ["10 euler steps", "1 ab2 step"]
