"""The `torch.library` namespace that every operator of the package lives in."""

from torch.library import Library

lib = Library("czm_fused", "FRAGMENT")
