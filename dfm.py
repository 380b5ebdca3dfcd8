"""Deep Fusion Module (paper section III-C): a pyramid of each modality, fused level by level.

The encoder gives one map of one scale for each modality. From each a pyramid of four scales is made
by transposed convolutions and pooling; on each level the modalities are reweighted channel by
channel and added.

Shapes: `B` batch, `M` modalities, `C` 256 channels, `h, w` tokens (a sixteenth of the pixels).
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from sam_vit import LayerNorm2d


class Pyramid(nn.Module):
    """(B, C, h, w) -> four maps of C channels at strides 1/4, 1/2, 1 and 2: 4h, 2h, h and h/2 rows.

    `norm` builds the normalisation between the two upsampling steps of the finest level.

    differs: the paper shrinks by a strided convolution, its code by a maximum.
    """

    def __init__(self, channels: int, norm: type[nn.Module]):
        super().__init__()
        self.up4 = nn.Sequential(
            upsample2(channels), norm(channels), nn.GELU(), upsample2(channels)
        )
        self.up2 = upsample2(channels)
        self.down2 = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.up4(x), self.up2(x), x, self.down2(x)]


def upsample2(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)


class SqueezeExcitation(nn.Module):
    """A gate in (0, 1) for each channel, computed from the means of all channels."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=(2, 3), keepdim=True))  # (B, C, h, w) -> (B, C, 1, 1)


class SEFusion(nn.Module):
    """The modalities of one level, each times its own gates, then added.

    One modality alone is passed on as it is, as in the published code.
    """

    def __init__(self, channels: int, modalities: int):
        super().__init__()
        count = modalities if modalities > 1 else 0
        self.se = nn.ModuleList(SqueezeExcitation(channels) for _ in range(count))

    def forward(self, maps: list[Tensor], seen: dict | None = None) -> Tensor:
        """M maps (B, C, h, w) -> (B, C, h, w). For `seen` see `DeepFusionModule.forward`."""
        gates = [se(x) for se, x in zip(self.se, maps)]  # M times (B, C, 1, 1)
        parts = [gate * x for gate, x in zip(gates, maps)] if gates else maps
        if seen is not None:
            seen.setdefault("levels", []).append({"parts": parts, "gates": gates})
        return add(parts)


def add(maps: list[Tensor]) -> Tensor:
    first, *others = maps
    return sum(others, first)


class DeepFusionModule(nn.Module):
    """M maps (B, C, h, w) -> 4 fused maps (B, C, ., .) at strides 1/4, 1/2, 1, 2; h and w even.

    differs: from the paper, as the published code does: the first modality's pyramid normalises by
    layer, the others' by batch.
    """

    def __init__(self, channels: int = 256, modalities: int = 2):
        super().__init__()
        norms = [LayerNorm2d, *[nn.BatchNorm2d] * (modalities - 1)]
        self.pyramids = nn.ModuleList(Pyramid(channels, norm) for norm in norms)
        self.levels = nn.ModuleList(SEFusion(channels, modalities) for _ in range(4))

    def forward(self, maps: tuple[Tensor, ...], seen: dict | None = None) -> list[Tensor]:
        """Into `seen`, if given, goes "levels": for each level, finest first, "parts", the M maps
        (B, C, ., .) that are added, and "gates", M times (B, C, 1, 1), [] for one modality."""
        pyramids = [pyramid(x) for pyramid, x in zip(self.pyramids, maps)]
        return [fuse(list(level), seen) for fuse, level in zip(self.levels, zip(*pyramids))]


class SumFusion(nn.Module):
    """ "Without DFM" of Table V: the maps are added, one scale, no skips for the decoder."""

    def forward(self, maps: tuple[Tensor, ...], seen: dict | None = None) -> list[Tensor]:
        if seen is not None:
            seen["levels"] = [{"parts": list(maps), "gates": []}]
        return [add(list(maps))]
