"""Chunks are read in order, and weights are counted by binade."""

from concurrent.futures import ThreadPoolExecutor

import torch

from opd.checkpoint.chunks import binades, in_order


def test_binades_are_floors_of_logarithms_and_zeros_are_apart() -> None:
    w = torch.tensor([0.0, -0.0, 1e-40, 1.0, -1.99, 2.0, 0.5, 2.0**-126, 3e38])
    bins = binades(w)
    assert bins[0] == bins[1] == 0
    assert bins[2] == 1
    assert (bins[3:].astype(int) - bins[3] == [0, 0, 1, -1, -126, 127]).all()


def test_threads_answer_in_order() -> None:
    with ThreadPoolExecutor(2) as pool:
        assert list(in_order(pool, lambda n: n * n, range(50))) == [n * n for n in range(50)]
