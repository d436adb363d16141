"""Two sentences of NumPy's manual as claims, for `ctxlab audit docs/example_ledger.py`."""

from itertools import pairwise

import numpy as np

from ctxlab.audit import Trial, gain_claim, saving_claim

MANUAL = "https://numpy.org/doc/stable/reference/"
CHAINS = {  # m, k, n, p of three matrices, m x k, k x n and n x p
    "thin": (400, 400, 400, 40),
    "square": (300, 300, 300, 300),
    "manual": (10, 100, 5, 50),  # the example of the manual
    "turned": (50, 5, 100, 10),  # the same, transposed
}


def chain(name):
    def matrices(seed):
        rng = np.random.default_rng(seed)
        return [rng.standard_normal(shape) for shape in pairwise(CHAINS[name])]

    def in_order(seed):
        A, B, C = matrices(seed)
        return lambda: A @ B @ C

    def multi_dot(seed):
        ABC = matrices(seed)
        return lambda: np.linalg.multi_dot(ABC)

    trial = Trial(f"{name} chain", {"A @ B @ C": in_order, "multi_dot": multi_dot})
    says = f"multi_dot is twice as fast or more at {CHAINS[name]}"
    where = MANUAL + "generated/numpy.linalg.multi_dot.html"
    return gain_claim(name, says, trial, "multi_dot", percent=(100, 400), where=where)


def temporary(name, size):
    A, B, C = np.random.default_rng(0).standard_normal((3, size))

    def in_place():
        G = A * B
        return np.add(G, C, out=G)

    forms = (lambda: lambda: A * B + C), (lambda: in_place)
    says = f"out= saves the temporary array of A * B + C, of {size:,} numbers"
    saved = (A.nbytes, A.nbytes)
    return saving_claim(name, says, forms, nbytes=saved, where=MANUAL + "ufuncs.html")


LEDGER = [*map(chain, CHAINS), temporary("out-80kB", 10_000), temporary("out-800kB", 100_000)]
