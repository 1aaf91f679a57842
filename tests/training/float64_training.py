"""czm-train in float64: what two ways to train agree on is then no matter of rounding."""

import sys

from czm_fused.training import batches, trainer
from czm_fused.training.__main__ import main

if __name__ == "__main__":
    build = trainer.build_model
    trainer.build_model = lambda *args, **kwargs: build(*args, **kwargs).double()
    normalise = batches.Normalisation.__call__
    batches.Normalisation.__call__ = lambda self, pixels: normalise(self, pixels).double()
    sys.exit(main())
