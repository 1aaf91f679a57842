import pytest
import torch


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two gloo processes; `ranks.run(function, *arguments)` runs a function on both."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch is built without torch.distributed, or without gloo")
    from ranks import Ranks

    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()
