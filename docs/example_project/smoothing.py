"""A moving average of arrays, and a projection: forms that allocate, and forms that do not."""

import numpy as np


def smooth(x, state, rate):
    """Move `state` towards `x`. It looks as if it worked in place."""
    state += rate * (x - state)


def smooth_into(x, state, rate, scratch):
    """Move `state` towards `x`, in place, with the help of `scratch`."""
    np.subtract(x, state, out=scratch)
    np.multiply(scratch, rate, out=scratch)
    np.add(state, scratch, out=state)


def project_even(x, weights, out):
    """The even columns of `x` times `weights`, into `out`. NumPy copies these columns for BLAS."""
    np.matmul(x[:, ::2], weights, out=out)


def project(x, weights, out):
    """`x` times `weights`, into `out`."""
    np.matmul(x, weights, out=out)
