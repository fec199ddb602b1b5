"""A network of this package through timm alone: make it, train one step, save it, load it.

python examples/timm_ten_lines.py
"""

import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file

import sansmax  # noqa: F401 - registers the models with timm
from sansmax.data.mosaics import DigitMosaics

images = DigitMosaics("train", 20)
x = torch.from_numpy(np.stack([images.read(i) for i in range(len(images))]))[:, None] / 127.5 - 1
y = torch.from_numpy(images.labels)

torch.manual_seed(0)
model = timm.create_model("seqnorm_vit_pico_patch8_128", num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loss = torch.nn.functional.cross_entropy(model(x), y)
loss.backward()
optimizer.step()
print(f"loss before the step {loss.item():.4f}")

model.eval()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.safetensors"
    save_file(model.state_dict(), path)
    again = timm.create_model("seqnorm_vit_pico_patch8_128", num_classes=10, checkpoint_path=str(path)).eval()
with torch.no_grad():
    before, after = model(x), again(x)
    print(f"loss after the step {torch.nn.functional.cross_entropy(after, y).item():.4f}")
assert torch.equal(before, after)
print(f"saved and loaded: the same logits, {tuple(after.shape)}")
