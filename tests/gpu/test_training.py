"""What only a GPU can show of the reference training: captured steps, and seeds on streams."""

import copy

import pytest
import torch

from czm_fused.ops import backends
from czm_fused.training.captured import EAGER_STEPS
from czm_fused.training.data import DataSet, Images
from czm_fused.training.loop import Trainer, train_epoch
from czm_fused.training.settings import resolve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

QUICK = {
    "dataset": "cifar10",
    "depth": 8,
    "batch_size": 32,
    "last_batch": "keep",
    "lr": 0.05,
    "epochs": 2,
    "milestones": [1],
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
    return Trainer(resolve({**QUICK, **given}), images, torch.device("cuda", 0))


def step_backends():
    return [name for name in ("cuda", "triton") if backends.problem(name, "cuda") is None]


def assert_same_training(actual, expected):
    for _ in range(2):
        assert actual.train_epoch()[0] == pytest.approx(expected.train_epoch()[0], rel=TOLERANCE)
        assert actual.test()[0] == pytest.approx(expected.test()[0], rel=TOLERANCE)
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
    for name, state in eager.state_dict()["generators"].items():
        assert torch.equal(graph.state_dict()["generators"][name], state)


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
    with trainer._own():
        batch = torch.arange(32, device="cuda")
        losses = [trainer._train(batch)[0] for _ in range(EAGER_STEPS + 5)]
        replayed = torch.stack(losses[EAGER_STEPS:]).tolist()
    assert len(set(replayed)) == len(replayed)


def test_graph_follows_the_schedule(images):
    trainer = trainer_of(images, cuda_graph=True)
    trainer.train_epoch()
    with trainer._own():
        for group in trainer.optimizer.param_groups:
            group["lr"].zero_()
            group["weight_decay"] = 0.0
    torch.cuda.synchronize()
    before = [param.detach().clone() for param in trainer.model.parameters()]
    trainer.train_epoch()
    for param, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(param, old)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_seeds_on_streams_train_as_alone(images, cuda_graph):
    together = [trainer_of(images, seed=seed, cuda_graph=cuda_graph) for seed in (0, 1)]
    alone = [trainer_of(images, seed=seed, cuda_graph=cuda_graph) for seed in (0, 1)]
    for _ in range(2):
        results = train_epoch(together)
        for result, trainer in zip(results, alone, strict=True):
            assert result[0] == pytest.approx(trainer.train_epoch()[0], rel=TOLERANCE)


def test_captured_run_resumes(images):
    graph = trainer_of(images, cuda_graph=True)
    graph.train_epoch()
    resumed = trainer_of(images, cuda_graph=True)
    resumed.load_state_dict(copy.deepcopy(graph.state_dict()))
    assert resumed.train_epoch()[0] == pytest.approx(graph.train_epoch()[0], rel=TOLERANCE)
