"""Linear centred kernel alignment (Kornblith et al., ICML 2019): are two representations alike?"""

from __future__ import annotations

from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Similarity in 0..1 of features of the same n samples, x: (n, p) and y: (n, q). A scalar.

    `<H XX^T H, H YY^T H> / (|H XX^T H| |H YY^T H|)` with `H = I - 11^T / n`, in double precision:
    unchanged by a rotation, one scale and a shift of either side; nan where a side is constant.
    """
    x, y = x.double(), y.double()
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) <= min(x.shape[1], y.shape[1]):  # n x n Gram matrices are the smaller ones
        left, right = x @ x.T, y @ y.T
        return (left * right).sum() / (left.norm() * right.norm())
    # The same figure from p x q matrices, as <XX^T, YY^T> = |X^T Y|^2.
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
