"""What passes, and what fails and how: this is an example, and half of it is meant to fail."""

import numpy as np
import pytest
from smoothing import project, project_even, smooth, smooth_into


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 64, 64))


def test_smooth_into_works_in_place(arrays, no_allocation):
    x, state, scratch = arrays
    no_allocation(lambda: smooth_into(x, state, 0.5, scratch))


def test_smooth_works_in_place(arrays, no_allocation):  # fails: two arrays in one line
    x, state, _ = arrays
    no_allocation(lambda: smooth(x, state, 0.5))


def test_project_works_in_place(arrays, no_allocation):
    x, weights, out = arrays
    no_allocation(lambda: project(x, weights, out))


def test_project_even_works_in_place(arrays, no_allocation):  # fails where memray is installed
    x, weights, out = arrays
    no_allocation(lambda: project_even(x, weights[:32], out))


def test_both_forms_give_the_same(arrays, same):
    x, state, scratch = arrays
    other = state.copy()
    smooth(x, state, 0.5)
    smooth_into(x, other, 0.5, scratch)
    assert same(other, state)


def test_another_rate_gives_the_same(arrays, same):  # fails: it does not
    x, state, _ = arrays
    other = state.copy()
    smooth(x, state, 0.5)
    smooth(x, other, 0.5000001)
    assert same(other, state)
