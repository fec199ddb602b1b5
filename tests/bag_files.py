"""Files as the neighbours write them, made by h5py and torch from the definitions of their formats."""

import h5py
import numpy as np
import torch

TRIDENT_COORDS = {
    "patch_size": 256,
    # the command line's magnification is a float, and so is what follows from it
    "patch_size_level0": 512.0,
    "level0_magnification": 40,
    "target_magnification": 20.0,
    "overlap": 0,
    "level0_width": 30000,
    "level0_height": 20000,
}


def drawn(tokens, width=8, seed=0, side=512, dtype=np.float32):
    """Features, and corners on a grid of `side` pixels, each once, in no order."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((tokens, width)).astype(dtype)
    cells = rng.permutation(max(30 * 20, tokens))[:tokens]
    return features, np.stack([cells % 30, cells // 30], axis=1).astype(np.int64) * side


def write_trident(path, features, xy, encoder="uni_v2", **changed):
    """features_ENCODER/SLIDE.h5: a chunk for every tile; (0,) where there is no tissue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name, folder = path.stem, str(path.parent)
    with h5py.File(path, "w") as file:
        if len(features):
            shape = {"chunks": (1, features.shape[1]), "maxshape": (None, features.shape[1])}
            kept = file.create_dataset("features", data=features, **shape)
        else:
            kept = file.create_dataset("features", data=np.zeros((0,), np.float32))
        kept.attrs.update({"name": name, "savetodir": folder, "encoder": encoder})
        coords = file.create_dataset("coords", data=xy, chunks=(1, 2), maxshape=(None, 2))
        for key, value in {**TRIDENT_COORDS, "name": name, "savetodir": folder, **changed}.items():
            coords.attrs[key] = "None" if value is None else value
    return path


def write_trident_patches(path, xy):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        coords = file.create_dataset("coords", data=xy, chunks=(1, 2), maxshape=(None, 2))
        coords.attrs.update({**TRIDENT_COORDS, "name": path.stem, "savetodir": str(path.parent)})


def write_trident_slide(path, width=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = np.ones(width, np.float32)
        file["coords"] = np.zeros((4, 2), np.int64)
        file["coords"].attrs.update(TRIDENT_COORDS)


def write_clam(folder, slide_id, features, xy):
    """h5_files and pt_files, in chunks of 32 tiles, int32 and no attributes."""
    for name in ("h5_files", "pt_files"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "h5_files" / f"{slide_id}.h5", "w") as file:
        for name, data in (("features", features), ("coords", xy.astype(np.int32))):
            file.create_dataset(name, data=data, chunks=(32, data.shape[1]), maxshape=(None, data.shape[1]))
    torch.save(torch.from_numpy(features), folder / "pt_files" / f"{slide_id}.pt")
    return folder / "h5_files" / f"{slide_id}.h5"


def write_clam_patches(path, xy, patch_size=256, downsample=4.0, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        coords = file.create_dataset("coords", data=xy, chunks=(1, 2), maxshape=(None, 2))
        said = {"patch_size": patch_size, "patch_level": 1, "downsample": np.array([downsample, downsample])}
        said |= {"downsampled_level_dim": np.array([7500, 5000]), "level_dim": np.array([7500, 5000])}
        coords.attrs.update({**said, "name": path.stem, "save_path": str(path.parent), **more})
    return path


def write_stamp(path, features, um, **root):
    """EXTRACTOR/SLIDE.h5 of version 2.5; a value of None leaves the attribute away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"stamp_version": "2.5.0", "extractor": "mahmood-uni2", "unit": "um", "tile_size_um": 256.0}
    said |= {"tile_size_px": 224, "code_hash": "0a1b2c3d", "feat_type": "tile", **root}
    with h5py.File(path, "w") as file:
        file["feats"] = features.astype(np.float16)
        file["coords"] = um.astype(np.float32)
        file.attrs.update({name: value for name, value in said.items() if value is not None})
    return path


def attributes(thing):
    """Attributes as they lie in the file, arrays as lists."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in thing.attrs.items()}
