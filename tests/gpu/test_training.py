"""What only a GPU can show of the reference training: captured steps."""

import copy

import pytest
import torch

from czm_fused.ops import backends
from czm_fused.training import Config
from czm_fused.training.captured import EAGER_STEPS
from czm_fused.training.data import DataSet, Images
from czm_fused.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

QUICK = {
    "dataset": "cifar10",
    "depth": 8,
    "batch_size": 32,
    "last_batch": "keep",
    "lr": 0.05,
    "epochs": 2,
    "milestones": (1,),
}
# 20 steps amplify float32's rounding, which on a GPU is not the same twice.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        256, (10 * 32 + 7, 3, 32, 32), generator=generator, dtype=torch.uint8
    )
    part = Images(pixels, torch.randint(10, (len(pixels),), generator=generator))
    return DataSet(part, part, 10).to(torch.device("cuda", 0))


def trainer_of(images, **given):
    config = Config(**{**QUICK, **given})
    return Trainer(config, images, torch.device("cuda", 0))


def step_backends():
    return [name for name in ("cuda", "triton") if backends.problem(name, "cuda") is None]


def assert_same_training(actual, expected):
    results = []
    for trainer in (actual, expected):
        torch.manual_seed(0)
        results.append([part()[0] for part in (trainer.train_epoch, trainer.test) * 2])
    assert results[0] == pytest.approx(results[1], rel=TOLERANCE)
    for a, b in zip(actual.model.parameters(), expected.model.parameters(), strict=True):
        bound = 10 * TOLERANCE * float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("options", [{}, {"channels_last": True}])
def test_captured_training_is_the_eager_one(images, backend, options):
    if backend not in step_backends():
        pytest.skip(str(backends.problem(backend, "cuda")))
    graph = trainer_of(images, cuda_graph=True, backend=backend, **options)
    eager = trainer_of(images, backend=backend, **options)
    assert_same_training(graph, eager)
    # Augmentation and noise were drawn alike: the generators have come equally far.
    states = [trainer.state_dict()["generators"] for trainer in (graph, eager)]
    assert torch.equal(states[0]["data"], states[1]["data"])


@pytest.mark.parametrize("method", ["bn", "czmig"])
@pytest.mark.parametrize(
    "options", [{"autocast": "bfloat16", "channels_last": True}, {"tf32": True}]
)
def test_captured_training_learns(images, method, options):
    trainer = trainer_of(images, method=method, cuda_graph=True, **options)
    losses = [trainer.train_epoch()[0] for _ in range(4)]
    assert losses[-1] < losses[0]


def test_every_replay_draws_anew(images):
    trainer = trainer_of(images, cuda_graph=True, noise=0.3, crop_padding=4, lr=0.0, head_lr=0.0)
    trainer.model.train()
    with trainer._context():
        batch = torch.arange(32, device="cuda")
        losses = [trainer._train(batch)[0] for _ in range(EAGER_STEPS + 5)]
        replayed = torch.stack(losses[EAGER_STEPS:]).tolist()
    assert len(set(replayed)) == len(replayed)


def test_graph_follows_the_schedule(images):
    trainer = trainer_of(images, cuda_graph=True)
    trainer.train_epoch()
    trainer._rates = [0.0] * len(trainer._rates)
    torch.cuda.synchronize()
    before = [param.detach().clone() for param in trainer.model.parameters()]
    trainer.train_epoch()
    for param, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(param, old)


def test_captured_run_resumes(images):
    graph = trainer_of(images, cuda_graph=True)
    graph.train_epoch()
    state = copy.deepcopy(graph.state_dict())
    resumed = trainer_of(images, cuda_graph=True)
    resumed.load_state_dict(state)
    loss = resumed.train_epoch()[0]
    graph.load_state_dict(state)
    assert loss == pytest.approx(graph.train_epoch()[0], rel=TOLERANCE)
