"""Attention as pure functions: formula, paper, shapes, and the sums over tokens that make it linear.

An attention takes `q, k, v` (SOFT: `q, v, landmarks`) of shape (B, heads, N, d) and a `mask` (B, N) that is True for
real tokens.
"""

from sansmax.ops.inverse import cholesky_inverse, newton_inverse, newton_inverse_halved
from sansmax.ops.landmarks import LandmarkSums, grid_landmarks, sequence_landmarks
from sansmax.ops.moments import Mean, Moments
from sansmax.ops.pointwise import PointwiseState, pointwise_attend, pointwise_attention
from sansmax.ops.seqnorm import SeqNormState, seqnorm_affine, seqnorm_attend, seqnorm_attention
from sansmax.ops.sima import (
    L1State,
    ProjectedL1State,
    l1_affine,
    projected_l1,
    sima_affine,
    sima_attend,
    sima_attention,
    sima_of_keys,
)
from sansmax.ops.soft import (
    SoftLayerState,
    SoftState,
    landmark_inverse,
    soft_affine,
    soft_attend,
    soft_attention,
    soft_layer_rows,
)
from sansmax.ops.softmax import softmax_attention

__all__ = [
    "L1State",
    "LandmarkSums",
    "Mean",
    "Moments",
    "PointwiseState",
    "ProjectedL1State",
    "SeqNormState",
    "SoftLayerState",
    "SoftState",
    "cholesky_inverse",
    "grid_landmarks",
    "l1_affine",
    "landmark_inverse",
    "newton_inverse",
    "newton_inverse_halved",
    "pointwise_attend",
    "pointwise_attention",
    "projected_l1",
    "seqnorm_affine",
    "seqnorm_attend",
    "seqnorm_attention",
    "sequence_landmarks",
    "sima_affine",
    "sima_attend",
    "sima_attention",
    "sima_of_keys",
    "soft_affine",
    "soft_attend",
    "soft_attention",
    "soft_layer_rows",
    "softmax_attention",
]
