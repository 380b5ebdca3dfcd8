"""Every network on a device that is not there: shapes and devices alone, as of a GPU.

Run by test_device.py in a process of its own, since the device stays registered. An operation on
tensors of two devices raises here, as it would on a GPU, and what is done on a CPU alone is not.
"""

import torch
from conftest import TINY
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fast
import zoo  # noqa: F401
from engine.training import segmentation_loss
from mfnet import build_mfnet
from tuners import TUNERS

_setup_privateuseone_for_python_backend("nowhere")
NOWHERE = torch.device("nowhere")
# Drawing random states of a device that is not there ends the process.
fast.checkpoint = lambda function, x, **_: function(x)


def check(tuner: str, accelerated: bool, bands: tuple[int, ...], encoder_alone: bool) -> None:
    """Forward and backward pass of a batch, or of its encoder, with rasters of so many bands."""
    mode = FakeTensorMode()

    def moved(t):
        return FakeTensor(mode, t.detach(), NOWHERE)

    def empty(*shape, dtype=torch.float32):
        return moved(torch.empty(*shape, dtype=dtype, device="meta"))

    with torch.device("meta"):
        model = build_mfnet(TINY, tuner, 3, len(bands), bands=bands, fills=len(bands) > 2)
    if accelerated:
        fast.accelerate(model)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(moved(p), p.requires_grad)
        for name, b in module._buffers.items():
            module._buffers[name] = b if b is None else moved(b)
    batch = [empty(2, count, 96, 96) for count in bands]
    labels = empty(2, 96, 96, dtype=torch.long)
    with mode:
        if encoder_alone:
            loss = sum(m.sum() for m in model.encode(*batch))
        else:
            loss = segmentation_loss(model(*batch), labels, 100.0, empty(3), 0.1)
        if loss.requires_grad:
            loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    devices = {t.device.type for t in (loss, *grads)}
    assert devices == {"nowhere"}, (tuner, accelerated, devices)
    assert grads or tuner == "frozen" and encoder_alone


for name in TUNERS:
    check(name, True, (3, 1), encoder_alone=True)
check("adapter", True, (3, 1, 2), encoder_alone=False)
check("lora", False, (4,), encoder_alone=False)
print(f"{len(TUNERS)} tuners")
