"""Train a network with the installed package, as its user would, on the kernel that was built."""

from pathlib import Path

import torch
from torch import nn

import czm_fused

folder = Path(czm_fused.__file__).parent
found = czm_fused.backends()
assert "site-packages" in folder.parts, folder
assert found.auto["cpu"] == "cpu", found
assert (folder / "py.typed").is_file()

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
)
czm_fused.czm_init_(model, stem="0")
groups = czm_fused.czm_param_groups(model, stem="0")
optimizer = czm_fused.FusedCZMSGD(groups, lr=0.05, momentum=0.9)
labels = torch.arange(32) % 2
# Light above or below.
images = 0.1 * torch.randn(32, 1, 8, 8)
images[labels == 0, :, :4] += 1
images[labels == 1, :, 4:] += 1
for _ in range(30):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
assert loss < 0.1, loss
print(f"czm-fused {czm_fused.__version__} on torch {torch.__version__}: loss {loss:.1e}")
