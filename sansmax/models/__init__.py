"""Networks, registered with timm on import: `timm.create_model("soft_tiny")`."""

import timm

from sansmax.models import convert, cvt, deit, slide, soft, vit, xcit
from sansmax.models.cvt import Cvt
from sansmax.models.pyramid import Pyramid
from sansmax.models.slide import GatedSlideNetwork, SlideNetwork
from sansmax.models.soft import Soft
from sansmax.models.vit import VisionTransformer
from sansmax.models.xcit import SimAXCiT

__all__ = [
    "Cvt",
    "GatedSlideNetwork",
    "Pyramid",
    "SimAXCiT",
    "SlideNetwork",
    "Soft",
    "VisionTransformer",
    "convert",
    "cvt",
    "deit",
    "list_models",
    "slide",
    "soft",
    "vit",
    "xcit",
]

# registered so that saved networks are found, but made of another one
_MADE_OF_OTHERS = ("converted",)


def list_models() -> list[str]:
    """Names of the networks of this package, as `timm.create_model` takes them."""
    # by where they come from: timm has files of its own by the names of ours
    ours = (name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(f"{__name__}."))
    return [name for name in ours if name not in _MADE_OF_OTHERS]
