"""What the options of speed must leave as it is."""

import copy

import pytest
import torch
from quick_runs import assert_same

from czm_fused.training import Config, captured, data
from czm_fused.training.captured import EAGER_STEPS, CapturedStep
from czm_fused.training.trainer import Trainer, float32_products

CPU = torch.device("cpu")
QUICK = {"depth": 8, "batch_size": 70, "last_batch": "keep", "noise": 0.2, "flip": True}


def trainer_of(**given):
    return Trainer(Config(**{**QUICK, **given}), data.digits(), CPU)


def two_epochs(trainer):
    """Train from the trainer's own seed: all draw their noise from torch's generator."""
    torch.manual_seed(0)
    return [trainer.train_epoch()[0] for _ in range(2)]


def assert_learns_the_same(actual, expected, bound):
    """Assert that losses of two epochs, and the weights after them, are the same to `bound`."""
    losses = [two_epochs(trainer) for trainer in (actual, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=bound)
    for a, b in zip(actual.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound * float(b.detach().abs().max()))


# Ten steps at a low rate amplify the rounding of sums, some 100 eps of their order, tenfold.
FLOAT32 = 1000 * torch.finfo(torch.float32).eps
BFLOAT16 = 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"channels_last": True}, FLOAT32),
        ({"autocast": "bfloat16"}, BFLOAT16),
        ({"channels_last": True, "autocast": "bfloat16"}, BFLOAT16),
    ],
)
def test_layout_and_precision_change_no_more_than_rounding(options, bound):
    given = {"lr": 0.05, "milestones": (1,)}
    actual, expected = trainer_of(**options, **given), trainer_of(**given)
    assert_learns_the_same(actual, expected, bound)
    weight = actual.model.units[0].conv1.weight
    assert weight.dtype == torch.float32
    layout = torch.channels_last if actual.config.channels_last else torch.contiguous_format
    assert weight.is_contiguous(memory_format=layout)


def test_autocast_computes_in_bfloat16():
    trainer = trainer_of(autocast="bfloat16", channels_last=True)
    seen = []
    trainer.model.units[0].conv1.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0], output))
    )
    trainer.train_epoch()
    for x, output in seen:
        assert output.dtype == torch.bfloat16
        assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("method", ["czmig", "bn"])
def test_compiled_training_is_the_eager_one(monkeypatch, method):
    compiled = []

    def compile_(model, **options):
        # Inductor takes minutes; what it is given, and when it is called, is what is ours.
        assert options == {"dynamic": False}
        run = real(model, backend="aot_eager", **options)
        return lambda x: (compiled.append(len(x)), run(x))[1]

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    given = {"method": method, "noise": 0.0, "lr": 0.05, "milestones": (1,)}
    assert_learns_the_same(trainer_of(compile=True, **given), trainer_of(**given), FLOAT32)
    # 300 images: the last batch of 20 runs eagerly, and so does no test.
    assert compiled == [70] * 8
    torch._dynamo.reset()


@pytest.fixture
def replays(monkeypatch):
    """Let a graph be a function that is called again; return the generators of each replay."""
    replays = []

    def capture(function, generators):
        # Of a loss, right answers and images, as every step returns them.
        result = torch.full((3,), torch.nan, dtype=torch.float64)

        def replay():
            replays.append(generators)
            result.copy_(function())

        return replay, result

    monkeypatch.setattr(captured, "capture", capture)
    return replays


def test_captured_step_runs_each_batch_once(replays):
    seen = []

    def step(indices):
        seen.append(indices.tolist())
        return torch.stack([indices.sum(), indices.max(), indices.min()]).double()

    run = CapturedStep(step, size=3)
    batches = [torch.arange(3) + number for number in range(EAGER_STEPS + 3)]
    batches.insert(EAGER_STEPS + 1, torch.arange(2))
    results = [run(batch) for batch in batches]
    assert seen == [batch.tolist() for batch in batches]
    # Also those of a replay are still there after the next one.
    for batch, result in zip(batches, results, strict=True):
        assert result.tolist() == [batch.sum(), batch.max(), batch.min()]
    assert len(replays) == 3


@pytest.mark.parametrize("method", ["czmig", "bn"])
def test_captured_training_is_the_eager_one(replays, method):
    given = {"method": method, "milestones": (1,), "batch_size": 50, "epochs": 2}
    actual, expected = trainer_of(cuda_graph=True, **given), trainer_of(**given)
    addresses = [rate.data_ptr() for rate in actual._rate_tensors]
    # A graph reads the rate as float32, half an eps from the eager one.
    assert_learns_the_same(actual, expected, FLOAT32)
    assert actual.lr == pytest.approx(expected.lr, rel=1e-7)
    assert [group["lr"].data_ptr() for group in actual.optimizer.param_groups] == addresses
    assert replays == [[actual.generator]] * (2 * 6 - EAGER_STEPS)
    assert_same(actual.state_dict()["generators"], expected.state_dict()["generators"])


def test_captured_run_resumes_as_an_eager_one_and_back(replays):
    graph = trainer_of(cuda_graph=True, batch_size=50)
    graph.train_epoch()
    state = copy.deepcopy(graph.state_dict())
    resumed = trainer_of(cuda_graph=True, batch_size=50)
    for _ in range(2):
        # What was captured before a state was loaded would go on with the old one.
        replays.clear()
        resumed.load_state_dict(copy.deepcopy(state))
        eager = trainer_of(batch_size=50)
        eager.load_state_dict(copy.deepcopy(state))
        assert_learns_the_same(resumed, eager, FLOAT32)
        assert len(replays) == 2 * 6 - EAGER_STEPS


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_products_are_set_and_restored(tf32):
    def now():
        return torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()

    before = now()
    with pytest.raises(KeyboardInterrupt), float32_products(tf32):
        assert now() == (("tf32", "high") if tf32 else ("ieee", "highest"))
        raise KeyboardInterrupt
    assert now() == before
