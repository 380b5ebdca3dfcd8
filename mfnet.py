"""MFNet (Ma et al., TGRS 2025): one frozen SAM encoder for M modalities, deep fusion, a decoder.

    image ---+                       +-> map --+
             +-> SAM's encoder, with |         +-> DeepFusionModule -> 4 scales -> decoder -> logits
    height --+   a tuner's blocks    +-> map --+

The modalities are stacked along the batch, modality-major, so the frozen layers see one batch of
M * B rasters. The decoder is UNetFormer's (Wang et al. 2022).

Shapes: `B` batch, `M` modalities, `H, W` pixels (of a raster, or of the map at hand inside the
decoder), `h, w` tokens (H/16, W/16), `C` channels (256 from the encoder, 64 in the decoder), `K`
classes, `s` side of a window.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import zoo  # noqa: F401  # whose tuners join TUNERS
from dfm import DeepFusionModule, SumFusion
from sam_vit import ImageEncoderViT, LoadReport, build_image_encoder, check_keys_match, our_names
from tuners import apply_tuner, tell_present, tuner_names

MIN_SIZE = 64  # pixels: below it the coarsest level has less than two rows to reflect
SIZE_STEP = 32  # pixels: patches of 16, and a coarsest level of half that resolution


def reflect_pad(x: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) -> (..., height, width), continued below and on the right by reflection.

    differs: F.pad refuses to reflect more than the map is wide; there the published decoder fails.
    """
    for dim, size in ((-2, height), (-1, width)):
        n = x.shape[dim]
        if size > n:
            i = torch.arange(size, device=x.device) % max(2 * n - 2, 1)
            x = x.index_select(dim, torch.minimum(i, 2 * n - 2 - i))
    return x


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


# ----------------------------------------------------------------------------------------- decoder


def conv_bn(c_in: int, c_out: int, kernel: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


def conv_bn_relu(c_in: int, c_out: int, kernel: int = 3) -> nn.Sequential:
    return conv_bn(c_in, c_out, kernel).append(nn.ReLU6())


def separable_conv(C: int, kernel: int) -> nn.Sequential:
    """Depthwise convolution, batch norm, 1x1 convolution; an even kernel loses a row and column."""
    depthwise = nn.Conv2d(C, C, kernel, padding=(kernel - 1) // 2, groups=C, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(C), nn.Conv2d(C, C, 1, bias=False))


def relative_position_index(s: int) -> Tensor:
    """(s * s, s * s) indices into a table of (2s - 1)^2 offsets, for the tokens of a window."""
    y, x = torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")
    dy = y.flatten()[:, None] - y.flatten()[None, :] + s - 1
    dx = x.flatten()[:, None] - x.flatten()[None, :] + s - 1
    return dy * (2 * s - 1) + dx


class GlobalLocalAttention(nn.Module):
    """Window attention, carried over window borders by averages along columns and rows, plus two
    local convolutions."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.local1 = conv_bn(dim, dim, 3)
        self.local2 = conv_bn(dim, dim, 1)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        table = torch.empty((2 * window - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.register_buffer("index", relative_position_index(window), persistent=False)
        self.proj = separable_conv(dim, window)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        across = average_rows_and_columns(self.window_attention(x), self.window)
        out = across + self.local1(x) + self.local2(x)  # (B, C, H, W)
        out = self.proj(reflect_pad(out, H + 1, W + 1))
        return out[..., :H, :W]

    def window_attention(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same; windows at the edge are filled up by reflection."""
        (B, C, H, W), s, heads = x.shape, self.window, self.num_heads
        qkv = reflect_pad(self.qkv(x), round_up(H, s), round_up(W, s))
        rows, cols = qkv.shape[-2] // s, qkv.shape[-1] // s
        qkv = qkv.view(B, 3, heads, C // heads, rows, s, cols, s).permute(1, 0, 4, 6, 2, 5, 7, 3)
        q, k, v = qkv.reshape(3, B * rows * cols, heads, s * s, C // heads)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)  # (heads, s*s, s*s)
        logits = (q * q.shape[-1] ** -0.5) @ k.mT + bias.to(q.dtype)
        out = (logits.softmax(dim=-1) @ v).view(B, rows, cols, heads, s, s, C // heads)
        out = out.permute(0, 3, 6, 1, 4, 2, 5).reshape(B, C, rows * s, cols * s)
        return out[..., :H, :W]


def average_rows_and_columns(x: Tensor, size: int) -> Tensor:
    """The mean over `size` rows plus the mean over `size` columns: one reflected row or column at
    the end, zeros around, counted as values."""
    H, W = x.shape[-2:]
    pad = size // 2 - 1
    vertical = F.avg_pool2d(reflect_pad(x, H + 1, W), (size, 1), stride=1, padding=(pad, 0))
    horizontal = F.avg_pool2d(reflect_pad(x, H, W + 1), (1, size), stride=1, padding=(0, pad))
    return vertical + horizontal


class ConvMLP(nn.Module):
    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, ratio * dim, 1)
        self.fc2 = nn.Conv2d(ratio * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.fc1(x)))


class DecoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = GlobalLocalAttention(dim, num_heads, window)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvMLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WeightedFusion(nn.Module):
    """x at twice its size plus a skip of the pyramid, with two normalised positive weights; then a
    convolution. Built without a skip (without DFM), it only enlarges and convolves."""

    def __init__(self, skip_channels: int | None, dim: int):
        super().__init__()
        self.post_conv = conv_bn_relu(dim, dim, 3)
        if skip_channels is not None:
            self.pre_conv = nn.Conv2d(skip_channels, dim, 1, bias=False)
            self.weights = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        if skip is not None:
            w = F.relu(self.weights)
            w = w / (w.sum() + 1e-8)
            x = w[0] * self.pre_conv(skip) + w[1] * x
        return self.post_conv(x)


class FeatureRefinementHead(WeightedFusion):
    """The last fusion, followed by a gate for each pixel and a gate for each channel."""

    def __init__(self, skip_channels: int | None, dim: int):
        super().__init__(skip_channels, dim)
        self.pa = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        squeeze = nn.Conv2d(dim, dim // 16, 1, bias=False)
        self.ca = nn.Sequential(squeeze, nn.ReLU6(), nn.Conv2d(dim // 16, dim, 1, bias=False))
        self.shortcut = conv_bn(dim, dim, 1)
        self.proj = separable_conv(dim, 3)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = super().forward(x, skip)
        by_pixel = x * torch.sigmoid(self.pa(x))
        by_channel = x * torch.sigmoid(self.ca(x.mean(dim=(2, 3), keepdim=True)))
        return F.relu6(self.proj(by_pixel + by_channel) + self.shortcut(x))


class Decoder(nn.Module):
    """Fused maps, finest first, at strides 4, 8, 16, 32 pixels -> logits at `size`.

    One map alone (without DFM) is decoded by the same layers without skips.
    """

    def __init__(self, num_classes: int, in_channels: int = 256, dim: int = 64, skips: bool = True):
        super().__init__()
        num_heads, window = 8, 8
        skip_channels = in_channels if skips else None
        self.pre_conv = conv_bn(in_channels, dim)
        self.b4 = DecoderBlock(dim, num_heads, window)
        self.p3 = WeightedFusion(skip_channels, dim)
        self.b3 = DecoderBlock(dim, num_heads, window)
        self.p2 = WeightedFusion(skip_channels, dim)
        self.b2 = DecoderBlock(dim, num_heads, window)
        self.p1 = FeatureRefinementHead(skip_channels, dim)
        features = conv_bn_relu(dim, dim)
        classify = nn.Conv2d(dim, num_classes, 1, bias=False)
        self.segmentation_head = nn.Sequential(features, nn.Dropout2d(0.1), classify)

    def forward(
        self, maps: list[Tensor], size: tuple[int, int], seen: dict | None = None
    ) -> Tensor:
        """(B, 256, ., .) each -> (B, K, *size). Into `seen`, if given, goes "decoder": the four
        stages (B, 64, ., .), coarsest first."""
        *skips, coarsest = maps
        fine, middle, coarse = skips or (None, None, None)
        x4 = self.b4(self.pre_conv(coarsest))  # (B, 64, h/2, w/2)
        x3 = self.b3(self.p3(x4, coarse))  # (B, 64, h, w)
        x2 = self.b2(self.p2(x3, middle))  # (B, 64, 2h, 2w)
        x1 = self.p1(x2, fine)  # (B, 64, 4h, 4w)
        if seen is not None:
            seen["decoder"] = [x4, x3, x2, x1]
        return F.interpolate(self.segmentation_head(x1), size=size, mode="bilinear")


# --------------------------------------------------------------------------------- any rasters


class Rasters(nn.Module):
    """What rasters need besides the encoder, which takes three channels of every one of them.

    One of 2, or of 4 and more bands has a 1x1 convolution to three channels, which starts as means
    of neighbouring bands (of two: both, and their mean) and is trained. With `fills` each has a
    vector that stands for the encoder's map of it where it is missing.
    """

    def __init__(self, bands: tuple[int, ...], fills: bool):
        super().__init__()
        several = {str(m): C for m, C in enumerate(bands) if C not in (1, 3)}
        self.projections = nn.ModuleDict({m: nn.Conv2d(C, 3, 1) for m, C in several.items()})
        for m, C in several.items():
            groups = [[0], [1], [0, 1]] if C == 2 else torch.arange(C).tensor_split(3)
            nn.init.zeros_(self.projections[m].weight)
            for weights, group in zip(self.projections[m].weight.data, groups):
                weights[group] = 1 / len(group)
            nn.init.zeros_(self.projections[m].bias)
        self.fills = nn.Parameter(torch.zeros(len(bands), 256)) if fills else None

    def three_channels(self, m: int, raster: Tensor) -> Tensor:
        """The m-th raster, (B, H, W) or (B, bands, H, W) -> (B, 3, H, W)."""
        if str(m) not in self.projections:
            return as_three_channels(raster)
        if raster.ndim != 4 or raster.shape[1] != (C := self.projections[str(m)].in_channels):
            raise ValueError(f"raster {m} has {C} bands: (B, {C}, H, W), not {raster.shape}")
        return self.projections[str(m)](raster)

    def fill(self, maps: tuple[Tensor, ...], present: Tensor | None) -> tuple[Tensor, ...]:
        """The encoder's maps (B, 256, h, w), with the fill of each where `present` (M, B) says
        that it is missing."""
        if present is None:
            return maps
        fills = self.fills[:, None, :, None, None].to(maps[0].dtype)  # (M, 1, 256, 1, 1)
        return tuple(torch.where(present[..., None, None, None], torch.stack(maps), fills))


# ------------------------------------------------------------------------------------- the network


class MFNet(nn.Module):
    """The whole network. Input values: image in [0, 1], height scaled to [0, 1] over its tile.
    `bands` are those of each raster, `fills` whether one may be missing: see `Rasters`."""

    def __init__(
        self,
        image_encoder: ImageEncoderViT,
        fusion: nn.Module,
        decoder: Decoder,
        bands: tuple[int, ...],
        fills: bool = False,
    ):
        super().__init__()
        self.image_encoder = image_encoder
        self.fusion = fusion
        self.decoder = decoder
        self.modalities, self.bands = len(bands), tuple(bands)
        self.rasters = Rasters(bands, fills)

    def forward(
        self,
        image: Tensor | None,
        dsm: Tensor | None = None,
        *more: Tensor,
        seen: dict | None = None,
    ) -> Tensor:
        """image (B, 3, H, W), dsm and any further raster (B, H, W), (B, 1, H, W) or (B, bands, H,
        W) -> (B, K, H, W).

        A network with fills takes rasters that are missing from images: NaN throughout. H and W are
        at least 64; what is no multiple of 32 is continued by reflection and cut off again. A
        network of one modality takes either of the two. Into a dict `seen` go the intermediates of
        this pass: "blocks" (`ImageEncoderViT.forward`), "maps" (M times (B, 256, h, w)), "levels"
        (`DeepFusionModule.forward`), "fused" (the decoder's input, finest first), "decoder"
        (`Decoder.forward`) and "logits".

        Raises ValueError for another number of rasters than the network has modalities, for rasters
        of different sizes, and for a size below 64.
        """
        maps = self.encode(image, dsm, *more, seen=seen)
        H, W = next(r for r in (image, dsm, *more) if r is not None).shape[-2:]
        fused = self.fusion(maps, seen)
        padded = round_up(H, SIZE_STEP), round_up(W, SIZE_STEP)
        logits = self.decoder(fused, padded, seen)[..., :H, :W]
        if seen is not None:
            seen.update(maps=maps, fused=fused, logits=logits)
        return logits

    def encode(
        self,
        image: Tensor | None,
        dsm: Tensor | None = None,
        *more: Tensor,
        seen: dict | None = None,
    ) -> tuple[Tensor, ...]:
        """The rasters as in `forward` -> the encoder's map of each, M times (B, 256, h, w)."""
        rasters, present = [r for r in (image, dsm, *more) if r is not None], None
        if len(rasters) != self.modalities:
            raise ValueError(f"this network takes {self.modalities} rasters, not {len(rasters)}")
        if self.rasters.fills is not None:
            present = torch.stack([~r.isnan().flatten(1).all(dim=1) for r in rasters])  # (M, B)
            rasters = [r.nan_to_num() for r in rasters]
            tell_present(self.image_encoder, present)
        rasters = [self.rasters.three_channels(m, r) for m, r in enumerate(rasters)]
        shapes = sorted({tuple(r.shape) for r in rasters})
        if len(shapes) > 1:
            raise ValueError(f"the rasters differ in batch or size: {shapes}")
        H, W = shapes[0][-2:]
        if min(H, W) < MIN_SIZE:
            raise ValueError(f"rasters of {H} x {W} pixels are too small; {MIN_SIZE} is the least")
        x = torch.cat(rasters)  # (M*B, 3, H, W)
        x = reflect_pad(x, round_up(H, SIZE_STEP), round_up(W, SIZE_STEP))
        return self.rasters.fill(self.image_encoder(x, seen).chunk(self.modalities), present)


def as_three_channels(raster: Tensor) -> Tensor:
    """(B, H, W) or (B, 1, H, W) -> (B, 3, H, W) by repetition; three channels stay."""
    if raster.ndim == 3:
        raster = raster[:, None]
    if raster.ndim != 4 or raster.shape[1] not in (1, 3):
        raise ValueError(f"a raster has one or three channels: (B, 3, H, W), not {raster.shape}")
    return raster.expand(-1, 3, -1, -1)


def build_mfnet(
    encoder: str | dict = "vit_l",
    tuner: str = "adapter",
    num_classes: int = 6,
    modalities: int = 2,
    fusion: str = "dfm",
    bands: tuple[int, ...] = (),
    fills: bool = False,
    **options,
) -> MFNet:
    """The network with random weights. `encoder`: a name in `sam_vit.SIZES` or a dict; `tuner`: a
    name in `tuners.TUNERS`, with its `options`; `fusion`: "dfm", or "sum" for the ablation without
    it; `bands` of each raster, by default three or one, and `fills`: see `Rasters`. Raises
    ValueError for anything else."""
    if fusion not in ("dfm", "sum"):
        raise ValueError(f"unknown fusion {fusion!r}; there are dfm, sum")
    image_encoder = apply_tuner(build_image_encoder(encoder), tuner, modalities, **options)
    fused = DeepFusionModule(modalities=modalities) if fusion == "dfm" else SumFusion()
    decoder = Decoder(num_classes, skips=fusion == "dfm")
    return MFNet(image_encoder, fused, decoder, bands or (3,) * modalities, fills)


def trained_names(model: MFNet) -> list[str]:
    """The names of all parameters that are meant to be trained: the tuner's, fusion and decoder."""
    tuned = {"image_encoder." + n for n in tuner_names(model.image_encoder)}
    names = [n for n, _ in model.named_parameters()]
    return [n for n in names if n in tuned or not n.startswith("image_encoder.")]


def count_parameters(model: MFNet) -> dict[str, int]:
    """Numbers of parameters: encoder (as SAM has it), tuner (what it added), fusion, decoder,
    rasters (where `Rasters` has some), total, trainable."""
    added = {"image_encoder." + n for n in model.image_encoder.added_names}
    counts = dict.fromkeys(("encoder", "tuner", "fusion", "decoder", "total", "trainable"), 0)
    for name, p in model.named_parameters():
        group = name.split(".")[0].replace("image_encoder", "encoder")
        group = "tuner" if name in added else group
        counts[group] = counts.get(group, 0) + p.numel()
        counts["total"] += p.numel()
        counts["trainable"] += p.numel() * p.requires_grad
    return counts


# ------------------------------------------------------------------- weights of the published code

# (published, ours); x is the image's, y the height's. `lora_Ax` and its like are collected into one
# tensor of ours.
PUBLISHED_NAMES = (
    (r"^sam\.", ""),
    (r"\.attn\.rel_([hw])$", r".attn.rel_pos_\1"),
    (r"\.Img_Adapter\.D_fc", r".attn_adapters.0.fc"),
    (r"\.DSM_Adapter\.D_fc", r".attn_adapters.1.fc"),
    (r"\.MLPx_Adapter\.D_fc", r".mlp_adapters.0.fc"),
    (r"\.MLPy_Adapter\.D_fc", r".mlp_adapters.1.fc"),
    (r"\.w([xy])_Adapter$", r".mixing:\1"),
    (r"\.lora_w([xy])$", r".mixing:\1"),
    (r"\.lora_([AB])([xy])$", r".lora_\1:\2"),
    (r"^fpn1x\.1\.ln\.", r"fpn1x.1."),
    (r"^fpn1x\.", r"fusion.pyramids.0.up4."),
    (r"^fpn1y\.", r"fusion.pyramids.1.up4."),
    (r"^fpn2x\.0\.", r"fusion.pyramids.0.up2."),
    (r"^fpn2y\.0\.", r"fusion.pyramids.1.up2."),
    *((rf"^fusion{i + 1}\.", rf"fusion.levels.{i}.") for i in range(4)),
    (r"\.se_rgb\.", r".se.0."),
    (r"\.se_depth\.", r".se.1."),
    (r"\.attn\.qkv\.0\.weight$", r".attn.qkv.weight"),
    (r"(decoder\.p[123]\.pre_conv)\.0\.", r"\1."),
    (r"\.pa\.0\.", r".pa."),
    (r"\.ca\.1\.0\.", r".ca.0."),
    (r"\.ca\.3\.0\.", r".ca.2."),
    (r"(segmentation_head\.2)\.0\.", r"\1."),
)
UNUSED = r"^sam\.(prompt_encoder|mask_decoder)\.|^sam\.pixel_|\.relative_position_index$"


def load_published_weights(model: MFNet, state_dict: dict[str, Tensor]) -> LoadReport:
    """Loads what the published code saved, of either tuner, into a network of two modalities.

    The published network holds its encoder twice, as `image_encoder.*` and `sam.image_encoder.*`;
    `module.` of a DataParallel is accepted. Raises WeightsError with both differences, and changes
    nothing, if it does not fit."""
    renamed, ignored = our_names(state_dict, PUBLISHED_NAMES, UNUSED)
    given = stack_modalities(renamed, model.state_dict())
    check_keys_match(model.state_dict(), given, "the published state dict")
    model.load_state_dict(given)
    return LoadReport(loaded=list(renamed), ignored=ignored)


def stack_modalities(given: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts the pairs `name:x`, `name:y` together as rows 0 and 1 of our `name`; the rest stays.

    A published LoRA of qkv holds q and v in one matrix, ours as two slices; a published mixing
    weight has one element. Other halves keep their names, for `check_keys_match` to refuse.
    """
    out = dict(given)
    for name, target in expected.items():
        pair = [given.get(f"{name}:{m}") for m in "xy"]
        if any(t is None for t in pair):
            continue
        ours = target[0].shape  # (slices, rows, columns), in theirs (slices * rows, columns); or ()
        if all(t.shape == target[0].reshape(-1, *ours[2:]).shape for t in pair):
            del out[f"{name}:x"], out[f"{name}:y"]
            out[name] = torch.stack([t.reshape(ours) for t in pair])
    return out
