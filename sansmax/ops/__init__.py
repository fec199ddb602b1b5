"""Attention as pure functions: formula, paper, shapes, and the sums over tokens that make it linear.

Every function takes `q, k, v` of shape (B, heads, N, d) and a `mask` (B, N) that is True for real tokens.
"""

from sansmax.ops.moments import Mean, Moments
from sansmax.ops.seqnorm import SeqNormState, seqnorm_affine, seqnorm_attend, seqnorm_attention
from sansmax.ops.softmax import softmax_attention

__all__ = [
    "Mean",
    "Moments",
    "SeqNormState",
    "seqnorm_affine",
    "seqnorm_attend",
    "seqnorm_attention",
    "softmax_attention",
]
