"""The network of a run: built from its settings, on the base that they name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from engine.console import Mistake, Ticker
from engine.pretrained import find_weights
from engine.settings import Settings
from geodata.layouts import LAYOUTS, image_bands
from mfnet import MFNet, build_mfnet
from sam_vit import ImageEncoderViT, LoadReport, load_sam_weights


def base_digest(encoder: ImageEncoderViT) -> str:
    """SHA-256 over SAM's tensors in the encoder, by sorted name and as float32: one hash for every
    format and spelling of a checkpoint, and for every tuner that stands on it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if name not in encoder.added_names:
            digest.update(f"{name} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def build_network(s: Settings, num_classes: int) -> MFNet:
    """A network as a run's settings describe it, with random weights. Seeds torch with the run's
    seed: what `--weights none` trains on is a function of it. Raises Mistake."""
    torch.manual_seed(s.seed)
    bands, fills = bands_of(s), bool(s.may_lack)
    how = dict(fusion=s.fusion, bands=bands, fills=fills, **s.tuner_option)
    try:
        return build_mfnet(s.encoder, s.tuner, num_classes, len(bands), **how)
    except ValueError as error:  # of the tuner's constructor
        listed = " ".join(f"{name}={value}" for name, value in s.tuner_option.items())
        raise Mistake(f"--tuner {s.tuner} with {listed or 'no option'}: {error}") from error


def bands_of(s: Settings) -> tuple[int, ...]:
    """How many bands each raster of a run has."""
    layout = LAYOUTS.get(s.data)
    known = {"image": len(image_bands(layout, s.bands, 99)), "dsm": 1}
    known |= {name: len(kind.bands) for name, kind in (layout.rasters if layout else {}).items()}
    known |= {name: len(form["bands"]) for name, form in s.kinds.items()}
    return tuple(known[name] for name in s.rasters)


def base_file(s: Settings) -> Path | None:
    """SAM's weights, fetched if need be; None for random ones. Raises WeightsError."""
    return find_weights(s.weights, s.encoder, Ticker("fetching SAM's weights, bytes"))


def build_model(s: Settings, num_classes: int) -> tuple[MFNet, dict, LoadReport | None]:
    """The network of a run on its base -> (model, base, report of loading SAM's weights; None for
    random ones). `base` names where the encoder's weights come from: {"weights", "seed", "sha256"}.
    Raises WeightsError."""
    path, model, report = base_file(s), build_network(s, num_classes), None
    if path is not None:
        report = load_sam_weights(model.image_encoder, path, s.relative_positions)
    base = {"weights": "random" if path is None else path.name, "seed": s.seed}
    return model, {**base, "sha256": base_digest(model.image_encoder)}, report
