"""What several test files share: a small encoder, random weights, hypothesis without a clock."""

import torch
from hypothesis import settings

from sam_vit import build_image_encoder

torch.set_num_threads(1)
settings.register_profile("house", deadline=None, max_examples=15)
settings.load_profile("house")

# A windowed and a global block; a grid of 4 is no multiple of the window of 3.
TINY = dict(
    embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=3, img_size=64
)


def randomise(module, seed=0):
    """Moves every parameter away from its start, so that no table, bias or LoRA is left at zero. In
    place.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            spread = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            p += spread * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def small_encoder(seed=0, **overrides):
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return randomise(build_image_encoder(TINY, **overrides), seed)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(module, state):
    now = module.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in state)
