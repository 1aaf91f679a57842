"""The oracle against the literal form: V and g as parameters, LUMA as a loss, torch.optim.SGD."""

import itertools

import pytest
import torch

from czm_fused.ops.step import reference

STEPS = 200


def _literal_run(
    weights: list[torch.Tensor],
    inputs: torch.Tensor,
    *,
    zmg: float,
    luma: float,
    grad_norm: float,
    maximize: bool,
    weight_decay: float,
    **sgd: object,
) -> list[torch.Tensor]:
    """Train `W = exp(g) V` with autograd through the product, and return every W on the way."""
    log_scales = [reference.initial_log_scale(w).requires_grad_() for w in weights]
    directions = [
        (w / g.detach().exp().view(-1, 1, 1, 1)).clone().requires_grad_()
        for w, g in zip(weights, log_scales, strict=True)
    ]
    optimizer = torch.optim.SGD(
        [
            {"params": directions, "weight_decay": weight_decay},
            {"params": log_scales, "weight_decay": 0.0},
        ],
        foreach=False,
        **sgd,
    )
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        materialized = [
            g.exp().view(-1, 1, 1, 1) * v for g, v in zip(log_scales, directions, strict=True)
        ]
        if grad_norm:
            for w in materialized:
                w.register_hook(lambda grad, w=w: _with_norm(grad, w.detach(), grad_norm))
        loss = _loss(materialized, inputs[step % len(inputs)])
        # The data loss is what maximize turns around; the anchor still pulls to 1.
        anchor = sum((v.flatten(1).norm(dim=1) - 1).square().sum() for v in directions)
        (loss * (-1 if maximize else 1) + luma * anchor).backward()
        for v in directions:
            v.grad -= zmg * v.grad.mean(dim=(2, 3), keepdim=True)
        optimizer.step()
        history.append(
            torch.cat([(g.exp().view(-1, 1, 1, 1) * v).detach().flatten()
                       for g, v in zip(log_scales, directions, strict=True)])
        )
    return history


def _with_norm(grad: torch.Tensor, weight: torch.Tensor, norm: float) -> torch.Tensor:
    """Return `grad` such that the gradient of every direction has `norm`."""
    pairs = zip(grad, weight, strict=True)
    return torch.stack([d * (norm / (w.norm() * d.norm())) for d, w in pairs])


def _loss(weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(torch.nn.functional.conv2d(x, weights[0], padding=1))
    # Bounded, so that ascent does not diverge and amplify rounding.
    return torch.sin(torch.nn.functional.conv2d(hidden, weights[1], padding=1)).square().mean()


def _reference_run(
    weights: list[torch.Tensor], inputs: torch.Tensor, *, maximize: bool, **hyper: object
) -> list[torch.Tensor]:
    params = [w.clone().requires_grad_() for w in weights]
    state = [
        (torch.zeros_like(p), reference.initial_log_scale(p.detach()), torch.zeros(len(p)).double())
        for p in weights
    ]
    dampening = hyper.pop("dampening")
    history = []
    for step in range(STEPS):
        for p in params:
            p.grad = None
        _loss(params, inputs[step % len(inputs)]).backward()
        with torch.no_grad():
            for p, (m, g, mg) in zip(params, state, strict=True):
                has_momentum = hyper["momentum"] != 0
                reference.step_(
                    p,
                    p.grad,
                    m if has_momentum else None,
                    g,
                    mg if has_momentum else None,
                    maximize=maximize,
                    dampening=dampening if step else 0.0,
                    **hyper,
                )
        history.append(torch.cat([p.detach().flatten() for p in params]))
    return history


SGD_OPTIONS = [
    {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.3, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
]


@pytest.mark.parametrize(
    ("sgd", "weight_decay", "maximize", "zmg", "luma", "grad_norm"),
    [
        (*others, grad_norm)
        for others in itertools.product(
            SGD_OPTIONS, (0.0, 1e-2), (False, True), (0.0, 0.85, 1.0), (0.0, 5e-4)
        )
        # At a larger norm filters reach the minimum, where gradients are nothing but rounding.
        for grad_norm in ((0.0, 0.01) if others[3] == 0.85 else (0.0,))
    ],
)
def test_reference_is_the_literal_form(sgd, weight_decay, maximize, zmg, luma, grad_norm):
    generator = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [0.3 * randn(4, 3, 3, 3), 0.3 * randn(2, 4, 3, 3)]
    inputs = randn(5, 2, 3, 5, 5)
    options = {
        **sgd,
        "lr": 0.02,  # ascent at 0.05 is chaotic and amplifies rounding a thousandfold
        "weight_decay": weight_decay,
        "maximize": maximize,
        "zmg": zmg,
        "luma": luma,
        "grad_norm": grad_norm,
    }
    literal = _literal_run(weights, inputs, **options)
    ours = _reference_run(weights, inputs, **options)
    for theirs, mine in zip(literal, ours, strict=True):
        # 200 steps of some 10 roundings each: 2000 * 2^-53 = 2e-13 if all add up.
        assert (theirs - mine).norm() <= 1e-12 * theirs.norm()
