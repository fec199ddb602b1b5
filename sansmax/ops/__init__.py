"""Attention as pure functions: formula, paper, shapes, and the sums over tokens that make it linear.

Every function takes `q, k, v` of shape (B, heads, N, d) and a `mask` (B, N) that is True for real tokens.
"""

from sansmax.ops.moments import Mean, Moments
from sansmax.ops.seqnorm import SeqNormState, seqnorm_affine, seqnorm_attend, seqnorm_attention
from sansmax.ops.sima import L1State, ProjectedL1State, projected_l1, sima_affine, sima_attend, sima_attention
from sansmax.ops.softmax import softmax_attention

__all__ = [
    "L1State",
    "Mean",
    "Moments",
    "ProjectedL1State",
    "SeqNormState",
    "projected_l1",
    "seqnorm_affine",
    "seqnorm_attend",
    "seqnorm_attention",
    "sima_affine",
    "sima_attend",
    "sima_attention",
    "softmax_attention",
]
