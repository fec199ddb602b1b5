"""Networks, registered with timm on import: `timm.create_model("seqnorm_vit_tiny_patch16_224")`."""

import timm

from sansmax.models import vit
from sansmax.models.vit import VisionTransformer

__all__ = ["VisionTransformer", "list_models", "vit"]


def list_models() -> list[str]:
    """Names of the networks of this package, as `timm.create_model` takes them."""
    return [name for module in (vit,) for name in timm.list_models(module=module.__name__.rsplit(".", 1)[-1])]
