"""A picture of 2048 x 2048 px in chunks of tokens, and the same picture all at once: equal logits, less memory.

    python examples/stream_large_picture.py

The weights are random; nothing is trained. Memory is read from Linux or macOS.
"""

import resource
import sys

import timm
import torch

import sansmax
from sansmax.data.mosaics import DigitMosaics


def peak_mib() -> float:
    """The largest memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


torch.manual_seed(0)
model = timm.create_model("seqnorm_vit_pico_patch8_128").eval()
pixels = DigitMosaics("test", 1, grid=256).read(0)
small = torch.from_numpy(pixels[:128, :128].copy())[None, None] / 127.5 - 1
with torch.no_grad():
    # what PyTorch sets up once does not count below
    model(small)

start = peak_mib()
streamed = sansmax.stream(model, pixels, chunk_tokens=4096)
in_chunks = peak_mib()
with torch.no_grad():
    whole = model(torch.from_numpy(pixels)[None, None] / 127.5 - 1)
at_once = peak_mib()

print(f"{pixels.shape[0]} x {pixels.shape[1]} px, {streamed.grid[0] * streamed.grid[1]:,} tokens")
print(f"largest difference of the logits: {(streamed.logits - whole).abs().max().item():.1e}")
print(f"memory beyond the picture and the network: in chunks {in_chunks - start:.0f} MiB, at once ", end="")
print(f"{at_once - start:.0f} MiB")
torch.testing.assert_close(streamed.logits, whole, rtol=1e-4, atol=1e-5)
