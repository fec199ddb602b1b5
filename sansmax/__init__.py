"""sansmax: softmax-free vision transformers whose attention costs linear time and memory.

Importing registers every model with timm:

    import sansmax, timm
    model = timm.create_model("seqnorm_vit_tiny_patch16_224", num_classes=5, img_size=512)
"""

from sansmax import models as models

__version__ = "0.1.0"
