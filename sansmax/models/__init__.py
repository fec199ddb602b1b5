"""Networks, registered with timm on import: `timm.create_model("seqnorm_vit_tiny_patch16_224")`."""

import timm

from sansmax.models import soft, vit
from sansmax.models.pyramid import Pyramid
from sansmax.models.soft import Soft
from sansmax.models.vit import VisionTransformer

__all__ = ["Pyramid", "Soft", "VisionTransformer", "list_models", "soft", "vit"]


def list_models() -> list[str]:
    """Names of the networks of this package, as `timm.create_model` takes them."""
    # by where they come from: timm has files of its own by the names of ours
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(f"{__name__}.")]
