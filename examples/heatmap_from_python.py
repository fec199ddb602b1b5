"""Train for a moment, ask for the scores of every token, and draw them beside the truth.

    python examples/heatmap_from_python.py [PICTURE.png]

The network counts digits: the class of a mosaic is the digit that fills half of its cells.
"""

import sys
import tempfile
from pathlib import Path

import sansmax
from sansmax.data.mosaics import DigitMosaics
from sansmax.report.heatmap import heatmap

picture = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example_heatmap.png")
config = sansmax.load_config(
    None,
    {
        "data.source": "mosaics:grid=8,share=0.5,train=500,val=50,test=50",
        "data.image_size": 64,
        "data.in_chans": 1,
        "model.name": "seqnorm_vit_pico_patch8_128",
        # a mirrored digit is another digit
        "augment.hflip": 0.0,
        "optim.lr": 3e-3,
        "epochs": 5,
        "batch_size": 16,
        "device": "cpu",
    },
)
mosaics = DigitMosaics("test", 50, grid=8, share=0.5)
with tempfile.TemporaryDirectory() as folder:
    run = sansmax.train(config, Path(folder) / "run")
    prediction = sansmax.predict(mosaics.read(3), run, scores="3")

assert prediction.scores is not None
truth = mosaics.truth(3) == 3
print(f"the mosaic of threes is taken for {prediction.predicted} ({100 * prediction.probabilities.max():.0f} %)")
print(f"mean score of cells with a 3: {prediction.scores[truth].mean():+.4f}")
print(f"mean score of other cells:    {prediction.scores[~truth].mean():+.4f}")
path = heatmap(mosaics.read(3), prediction.scores, picture, truth, class_name="3")
print(f"picture: {path}")
