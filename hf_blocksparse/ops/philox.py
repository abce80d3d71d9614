"""Philox4x32-10 (Salmon et al., SC 2011) in torch: which coefficients dropout keeps, the same bits as the kernels draw."""

import torch
from torch import Tensor

ROUNDS = 10
_WORD = 0xFFFFFFFF


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product, by halves, because int64 holds no unsigned 64-bit product."""
    low, high = factor * (word & 0xFFFF), factor * (word >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """First output word, int64 in [0, 2**32), for the counter `(c0, c1, c2, 0)`; counters broadcast."""
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        high_a, low_a = _multiply(0xD2511F53, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0


def dropout_threshold(dropout_p: float) -> int:
    """A coefficient is kept where its word is at least this."""
    return round(dropout_p * 2**32)


def dropout_keep(
    seed: int, dropout_p: float, query_row: Tensor, key_row: Tensor, batch_head: Tensor
) -> Tensor:
    """Bool, True where dropout keeps: rows of the tensors and `batch * query_heads + head`, broadcast together."""
    return philox(seed, query_row, key_row, batch_head) >= dropout_threshold(dropout_p)
