"""Deep Fusion Module (paper section III-C; PAPER.md 1): a pyramid of each modality, fused level by
level.

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
    """Each channel times a weight in (0, 1) that is computed from the means of all channels."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(dim=(2, 3), keepdim=True))


class SEFusion(nn.Module):
    """The modalities of one level, each squeezed and excited on its own, then added."""

    def __init__(self, channels: int, modalities: int):
        super().__init__()
        self.se = nn.ModuleList(SqueezeExcitation(channels) for _ in range(modalities))

    def forward(self, maps: list[Tensor]) -> Tensor:
        first, *others = (se(x) for se, x in zip(self.se, maps))
        return sum(others, first)


class DeepFusionModule(nn.Module):
    """M maps (B, C, h, w) -> 4 fused maps (B, C, ., .) at strides 1/4, 1/2, 1, 2; h and w even.

    The first modality's pyramid normalises by layer, the others' by batch, as published.
    """

    def __init__(self, channels: int = 256, modalities: int = 2):
        super().__init__()
        self.pyramids = nn.ModuleList(
            Pyramid(channels, norm=LayerNorm2d if m == 0 else nn.BatchNorm2d)
            for m in range(modalities)
        )
        self.levels = nn.ModuleList(SEFusion(channels, modalities) for _ in range(4))

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        pyramids = [pyramid(x) for pyramid, x in zip(self.pyramids, maps)]
        return [fuse(list(level)) for fuse, level in zip(self.levels, zip(*pyramids))]


class SumFusion(nn.Module):
    """ "Without DFM" of the paper's ablation: the maps are added, one scale, no skips for the
    decoder.
    """

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        first, *others = maps
        return [sum(others, first)]
