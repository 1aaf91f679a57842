import pytest

from czm_fused.training.config import Config, check_resumed, from_saved
from czm_fused.training.errors import TrainingError


def resolve(given):
    return Config(**given).checked()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("czmig", {"lr": 0.4, "head_lr": 0.1, "zmg": 0.85, "luma": 5e-4, "weight_decay": 0}),
        ("czmi", {"lr": 0.4, "head_lr": 0.1, "zmg": 0.0, "luma": 5e-4, "weight_decay": 0}),
        ("bn", {"lr": 0.1, "zmg": 0.0, "luma": 0.0, "weight_decay": 5e-4, "noise": 0}),
        ("plain", {"lr": 0.1, "zmg": 0.0, "luma": 0.0, "weight_decay": 5e-4, "noise": 0}),
    ],
)
def test_resolve_fills_in_the_methods_defaults(method, expected):
    settings = resolve({"method": method}).as_dict()
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize("dataset", ["imagefolder", "cifar10"])
def test_resolve_fills_in_the_papers_protocol_for_photographs(dataset):
    settings = resolve({"dataset": dataset})
    assert (settings.depth, settings.epochs, settings.batch_size) == (110, 200, 128)
    assert settings.rate_drops == (100, 150)
    assert (settings.crop_padding, settings.flip, settings.noise) == (4, True, 0.1)


def test_resolve_never_mirrors_digits():
    assert not resolve({"dataset": "digits"}).flip


@pytest.mark.parametrize(
    ("epochs", "milestones"), [(1, (1,)), (2, (1, 2)), (3, (2, 3)), (4, (2, 3)), (40, (20, 30))]
)
def test_resolve_puts_milestones_at_half_and_three_quarters(epochs, milestones):
    assert resolve({"epochs": epochs}).rate_drops == milestones


def test_resolve_leaves_options_of_speed_off():
    settings = resolve({})
    assert not (settings.channels_last or settings.tf32 or settings.compile or settings.cuda_graph)
    assert settings.autocast == "off"


def test_resolve_keeps_what_was_given():
    given = {"lr": 0.3, "luma": 1e-3, "milestones": (5,), "out": "somewhere", "noise": 0.0}
    settings = resolve(given)
    assert (settings.lr, settings.luma, settings.noise) == (0.3, 1e-3, 0.0)
    assert (settings.milestones, settings.out) == ((5,), "somewhere")
    assert settings.as_dict()["classifier_luma"] == 1e-3
    assert resolve({**given, "classifier_luma": 0.0}).as_dict()["classifier_luma"] == 0.0


def test_resolve_takes_batchnorms_noise_anywhere():
    assert resolve({"method": "bn", "noise": 0.1, "noise_on": "branch"}).noise_on == "branch"


def test_resolve_names_the_folder_after_the_run():
    settings = resolve({"method": "bn", "depth": 8, "seed": 3})
    assert settings.as_dict()["out"] == "runs/digits-bn-8-s3"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": 21}, "--depth.*nearest is 20"),
        ({"epochs": 0}, "--epochs must be at least 1, but was 0"),
        ({"batch_size": 0}, "--batch-size"),
        ({"crop_padding": -1}, "--crop-padding"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**63}, f"--seed must be at most {2**63 - 1}, but was {2**63}"),
        ({"milestones": (3, 2)}, "--milestones"),
        ({"milestones": (0,)}, "--milestones"),
        ({"method": "bn", "zmg": 0.5}, "--zmg has no effect on --method bn"),
        ({"method": "bn", "head_lr": 0.1}, "--head-lr has no effect"),
        ({"method": "plain", "luma": 1e-4}, "--luma has no effect"),
        ({"method": "czmi", "zmg": 0.85}, "--zmg has no effect on --method czmi"),
        ({"method": "bn", "residual_bias": True}, "--residual-bias has no effect"),
        ({"method": "bn", "gain": 1.0}, "--gain has no effect"),
        ({"method": "plain", "stem": "plain"}, "--stem has no effect"),
        ({"method": "bn", "grad_norm": 0.1}, "--grad-norm has no effect"),
        ({"method": "bn", "bias_lr": 0.1}, "--bias-lr has no effect"),
        ({"method": "plain", "center_every": 20}, "--center-every has no effect"),
        ({"center_every": -1}, "--center-every must be at least 0, but was -1"),
        ({"center_every": 20, "cuda_graph": True}, "--center-every is no part of a --cuda-graph"),
        ({"hold_out": -1}, "--hold-out must be at least 0, but was -1"),
        ({"method": "sgd"}, "invalid choice 'sgd' for argument '--method'.*'czmi', 'bn', 'plain'"),
        ({"lr": float("nan")}, "--lr must be a finite number, but was nan"),
        ({"depth": 20.0}, "--depth: invalid literal for int"),
        ({"epochs": True}, "--epochs"),
        ({"flip": "no"}, "Unrecognized options: no; --flip takes no value; see"),
        ({"milestones": "x"}, "--milestones"),
        ({"schedule": "cosine", "milestones": (1,)}, "--milestones has no effect on --schedule c"),
        ({"method": "bn", "noise_on": "branch"}, "--noise-on has no effect without noise: leave"),
        ({"noise": 0.0, "noise_on": "branch"}, "--noise-on has no effect without noise: leave it"),
    ],
)
def test_resolve_refuses_what_cannot_be(given, message):
    with pytest.raises(TrainingError, match=message):
        resolve(given)


SAVED = {"depth": 8, "lr": 0.3, "milestones": (1, 2)}


def test_saved_config_is_read_back():
    config = resolve(SAVED)
    assert from_saved(config.as_dict()).as_dict() == config.as_dict()


def test_check_resumed_lets_speed_and_place_change():
    may_change = {"epochs": 50, "cuda_graph": True, "device": "cuda", "cache_dir": "there"}
    check_resumed(resolve({**SAVED, **may_change}), resolve(SAVED))


@pytest.mark.parametrize(
    "given",
    [
        {"depth": 14},
        {"lr": 0.2},
        {"method": "czmi"},
        {"milestones": (3,)},
        {"seed": 1},
        {"autocast": "bfloat16"},
        {"tf32": True},
    ],
)
def test_check_resumed_refuses_another_run(given):
    name = next(iter(given))
    with pytest.raises(TrainingError, match=f"trained with --{name} "):
        check_resumed(resolve({"depth": 8, **given}), resolve({"depth": 8}))


def test_check_resumed_keeps_the_length_of_a_cosine():
    saved = resolve({"schedule": "cosine", "epochs": 4})
    check_resumed(saved, saved)
    with pytest.raises(TrainingError, match="trained with --epochs 4, not 5: leave the option out"):
        check_resumed(resolve({"schedule": "cosine", "epochs": 5}), saved)


@pytest.mark.parametrize("damage", [{"noise": None}, {"lr": "fast"}, {"depth": 9}, {"new": 1}])
def test_saved_config_of_another_version_or_damaged_is_refused(damage):
    saved = resolve({}).as_dict()
    if damage == {"noise": None}:
        del saved["noise"]
        damage = {}
    with pytest.raises(TrainingError, match="another version|--lr|--depth"):
        from_saved({**saved, **damage})
