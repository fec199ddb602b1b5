"""Networks, registered with timm on import: `timm.create_model("seqnorm_vit_tiny_patch16_224")`."""

from sansmax.models import vit
from sansmax.models.vit import VisionTransformer

__all__ = ["VisionTransformer", "vit"]
