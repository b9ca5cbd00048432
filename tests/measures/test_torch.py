"""Measures of torch models: Lipschitz bounds with batch normalisation, generative scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

import specops
import specops_torch
from specops import ClipSpectralNorm, errors


def settled(norm: Any, seed: int = 0) -> Any:
    """Batch normalisation with statistics and factors of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.copy_(torch.randn(values.shape, generator=generator))
        norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.1)
    return norm


def matrix_of(layer: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """The linear part of a layer in evaluation, column by column."""
    layer = layer.eval()
    size = int(np.prod(shape))
    eye = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        image = layer(eye) - layer(torch.zeros(1, *shape, dtype=torch.float64))
    return image.reshape(size, -1).T.numpy()


LINEAR = {
    "linear": (nn.Linear(6, 4), (6,)),
    "conv": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 7, 6)),
    "transposed": (nn.ConvTranspose1d(3, 2, 3, stride=2), (3, 5)),
    "batch norm": (settled(nn.BatchNorm2d(3)), (3, 2, 2)),
    "batch norm 1d": (settled(nn.BatchNorm1d(4), 1), (4,)),
    "average": (nn.AvgPool2d(2), (2, 6, 6)),
    "average, overlapping": (nn.AvgPool2d(3, stride=1, padding=1), (2, 5, 6)),
    "average, own counts": (nn.AvgPool1d(3, 2, 1, count_include_pad=False), (2, 7)),
    "average, ceil": (nn.AvgPool1d(3, 2, ceil_mode=True), (2, 8)),
    "adaptive": (nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 7)),
    "adaptive, repeating": (nn.AdaptiveAvgPool1d(7), (2, 3)),
    "global": (nn.AdaptiveAvgPool2d(1), (2, 4, 4)),
    "flatten": (nn.Flatten(), (2, 3)),
}


@pytest.mark.parametrize("key", LINEAR)
def test_factors_of_linear_layers_are_their_norms(key: str) -> None:
    layer, shape = LINEAR[key]
    layer = layer.double()
    bound = specops_torch.lipschitz_upper_bound(layer, shape)
    true = np.linalg.norm(matrix_of(layer, shape), 2)
    # Zero-padded convolutions are bounded on a torus.
    slack = 1.25 if isinstance(layer, nn.Conv2d | nn.ConvTranspose1d) else 1 + 1e-9
    assert true * (1 - 1e-9) <= bound.value <= true * slack


ACTIVATIONS = [
    nn.ReLU(),
    nn.LeakyReLU(0.2),
    nn.LeakyReLU(-3.0),
    nn.ELU(2.0),
    nn.CELU(3.0),
    nn.PReLU(init=1.5),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softplus(3.0),
    nn.Softsign(),
    nn.Hardtanh(),
    nn.LogSigmoid(),
]


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_no_activation_is_steeper_than_its_factor(layer: nn.Module) -> None:
    x = torch.linspace(-6, 6, 40001, dtype=torch.float64)
    layer = layer.double()
    with torch.no_grad():
        y = layer(x)
    steepest = float(((y[1:] - y[:-1]) / (x[1:] - x[:-1])).abs().max())
    factor = specops_torch.lipschitz_upper_bound(layer, (3,)).value
    assert steepest <= factor * (1 + 1e-9)
    assert factor <= steepest * 1.01


@pytest.mark.parametrize(
    "layer",
    [nn.MaxPool1d(2), nn.MaxPool1d(3, 1), nn.MaxPool1d(3, 2), nn.MaxPool1d(2, 1, dilation=3)],
    ids=str,
)
def test_max_pooling_repeats_an_entry_as_often_as_its_factor_says(layer: nn.Module) -> None:
    # One entry above the others moves every window that it is in.
    x = torch.zeros(1, 1, 30, dtype=torch.float64)
    moved = x.clone()
    moved[0, 0, 14] = 1.0
    reached = float((layer(moved) - layer(x)).norm())
    moved[0, 0, 15] = 0.0
    factor = specops_torch.lipschitz_upper_bound(layer, (1, 30)).value
    assert reached <= factor <= np.sqrt(np.ceil(factor**2)) * (1 + 1e-9)
    assert factor <= max(reached, 1.0) * np.sqrt(2)


def test_a_network_never_stretches_more_than_its_bound() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), settled(nn.BatchNorm2d(4)), nn.ReLU())
    model = nn.Sequential(block, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3))
    model.train()
    bound = specops_torch.lipschitz_upper_bound(model, (1, 6, 6))
    assert bound.layers == ("0.0 … 0.1", "0.2", "1", "2", "3", "4")
    assert len(bound.factors) == 6
    assert all(m.training for m in model.modules())
    x = torch.randn(40, 1, 6, 6)
    with torch.no_grad():
        y = model.eval()(x)
    ratios = specops.measures.lipschitz_ratios(x, y)
    assert 0 < float(ratios.max()) <= bound.value
    local = specops.measures.local_lipschitz(
        specops_torch.jacobian_operator(lambda v: model(v[None])[0], x[0])
    )
    assert local.value <= bound.value


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.LayerNorm(4), "0 (LayerNorm)"),
        (nn.BatchNorm1d(4, track_running_stats=False), "running statistics"),
        (nn.AvgPool1d(2), ""),
    ],
    ids=["layer norm", "no statistics", "fine"],
)
def test_unknown_layers_are_refused_by_name(layer: nn.Module, named: str) -> None:
    model = nn.Sequential(layer)
    if not named:
        assert specops_torch.lipschitz_upper_bound(model, (2, 4)).value < 1
        return
    with pytest.raises(errors.AdapterError) as caught:
        specops_torch.lipschitz_upper_bound(model, (4,))
    assert named in str(caught.value)


def doubling(bias: bool = False) -> nn.Linear:
    layer = nn.Linear(3, 3, bias=bias)
    layer.weight.data = 2.0 * torch.eye(3)
    return layer


def test_what_computes_something_else_is_refused() -> None:
    hooked = doubling()
    hooked.register_forward_hook(lambda m, i, o: 5 * o)
    for model in (
        nn.Sequential(hooked),
        nn.CELU(-1.0),
        nn.Softplus(1.0, threshold=0.0),
        nn.MaxPool1d(2, return_indices=True),
    ):
        with pytest.raises(errors.AdapterError):
            specops_torch.lipschitz_upper_bound(model, (3, 4) if "Pool" in str(model) else (3,))


def test_every_use_of_a_shared_layer_counts() -> None:
    layer = doubling()
    assert specops_torch.lipschitz_upper_bound(
        nn.Sequential(layer, nn.ReLU(), layer), (3,)
    ).value == pytest.approx(4.0, rel=1e-5)
    assert specops_torch.lipschitz_upper_bound(nn.ELU(-2.0), (3,)).value == 2.0


@pytest.mark.parametrize("kind", ["rule", "weight norm", "spectral norm", "parametrization"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_are_those_in_use(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False)
    model = nn.Sequential(layer)
    model.train()
    if kind == "rule":
        layer.weight.data *= 0.3
        specops.attach(None, model, specops.SpectralNormalization(norm="operator"))
    elif kind == "weight norm":
        nn.utils.weight_norm(layer)
        layer.weight_g.data *= 10.0
    elif kind == "spectral norm":
        nn.utils.spectral_norm(layer)
        layer.weight_orig.data *= 4.0
    else:
        nn.utils.parametrizations.spectral_norm(layer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = specops_torch.lipschitz_upper_bound(model, (6,)).value
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    with torch.no_grad():
        true = float(torch.linalg.matrix_norm(model.eval()(torch.eye(6)), 2))
    assert found == pytest.approx(true, rel=1e-5)


def test_sizes_that_an_attachment_has_seen_stay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    attachment = specops.attach(None, model, ClipSpectralNorm(1.0))
    model(torch.zeros(1, 1, 8, 8))
    specops_torch.lipschitz_upper_bound(model, (1, 32, 32))
    assert "8×8" in attachment.report().rows[0].geometry


def test_normalisations_of_a_shared_convolution_and_of_repeated_modules() -> None:
    conv, relu = nn.Conv2d(2, 2, 1, bias=False), nn.ReLU()
    conv.weight.data = torch.eye(2)[:, :, None, None]
    large, small = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    large.weight.data *= 100.0
    model = nn.Sequential(nn.Sequential(conv, large), nn.Sequential(conv, small))
    attachment = specops.attach(None, model, specops.Monitor())
    model.eval()(torch.zeros(1, 2, 4, 4))
    assert attachment.report().rows[0].normalized == pytest.approx(100.0, rel=1e-4)
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    repeated = nn.Sequential(one, relu, two, relu, nn.BatchNorm1d(3))
    rows = specops.attach(None, repeated, specops.Monitor()).report().rows
    assert all(row.normalized is None for row in rows)


def test_reports_show_norms_with_the_normalisation_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        settled(nn.BatchNorm2d(3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 5),
        settled(nn.BatchNorm1d(5), 1),
        nn.Linear(5, 2),
    )
    attachment = specops.attach(None, model, ClipSpectralNorm(0.5))
    model.eval()(torch.zeros(1, 1, 4, 4))
    attachment.step()
    report = attachment.report()
    rows = {row.name: row for row in report.rows}
    double = model.double().eval()
    for name, layers, shape in (("0", double[:2], (1, 4, 4)), ("4", double[4:6], (48,))):
        row = rows[f"{name}.weight"]
        true = np.linalg.norm(matrix_of(layers, shape), 2)
        assert row.norm <= 0.5 * (1 + 1e-5)
        assert true * (1 - 1e-6) <= row.normalized <= true * 1.25
    assert rows["6.weight"].normalized is None
    assert rows["4.weight"].normalized == pytest.approx(true, rel=1e-6)
    assert "with batch norm" in str(report)
    assert f"{rows['0.weight'].normalized:.4g}" in str(report)
    assert "with batch norm" in report._repr_html_()
    plain = specops.attach(None, nn.Sequential(nn.Linear(3, 3)), ClipSpectralNorm(0.5))
    assert "with batch norm" not in str(plain.report())


class Channels(nn.Module):
    """Means of an image's rows: features of four numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(1, 3)).double()


def test_fid_is_the_frechet_distance_of_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 3, 4, 4, generator=generator)
    fake = 0.5 * torch.randn(150, 3, 4, 4, generator=generator) + 0.3
    got = specops_torch.frechet_inception_distance(real.split(64), fake.split(64), Channels())
    a, b = (Channels()(x).numpy() for x in (real, fake))
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    moved = np.sum((a.mean(0) - b.mean(0)) ** 2)
    expected = moved + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert got == pytest.approx(expected, rel=1e-4)
    with pytest.raises(errors.AdapterError, match="two images"):
        specops_torch.frechet_inception_distance([real[:1]], [fake], Channels())


def test_inception_score_is_its_definition() -> None:
    images = torch.randn(100, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))
    got = specops_torch.inception_score(images.split(30), classifier, splits=1)
    with torch.no_grad():
        p = classifier(images).double().softmax(1).numpy()
    expected = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1)))
    assert got.mean == pytest.approx(expected, rel=1e-5)
    several = specops_torch.inception_score(images.split(30), classifier, splits=4, seed=1)
    assert several == specops_torch.inception_score(images.split(30), classifier, splits=4, seed=1)
    with pytest.raises(errors.AdapterError, match="11 images"):
        specops_torch.inception_score([images[:11]], classifier, splits=10)
    with pytest.raises(errors.AdapterError, match="3 images"):
        specops_torch.inception_score([images[:3]], classifier, splits=4)


def test_inception_score_of_certain_logits() -> None:
    logits = torch.tensor([[300.0, 0, -300], [0, 300, -300]]).repeat(50, 1)
    for given in (logits, logits.double()):
        assert specops_torch.inception_score([given], nn.Identity(), splits=1).mean == (
            pytest.approx(2.0, rel=1e-6)
        )


def test_neural_divergence_between_equal_and_distant_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 600, 2, generator=generator)
    options: dict[str, Any] = {"steps": 150, "learning_rate": 1e-2}

    def critic() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))

    state = torch.get_rng_state()
    equal = specops_torch.neural_divergence(critic, a, b, **options)
    far = specops_torch.neural_divergence(critic, a, b + 6.0, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(equal) < 0.1
    assert 1.3 < far <= 2 * np.log(2)
    assert far == specops_torch.neural_divergence(critic, a, b + 6.0, **options)
    with pytest.raises(ValueError, match="held_out"):
        specops_torch.neural_divergence(critic, a, b, held_out=1.0)
    with pytest.raises(errors.AdapterError, match="one number for each"):
        specops_torch.neural_divergence(lambda: nn.Linear(2, 3), a, b, steps=1)
    with pytest.raises(errors.AdapterError, match="too few"):
        specops_torch.neural_divergence(critic, a[:1], b)
