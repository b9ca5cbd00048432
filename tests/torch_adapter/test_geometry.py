"""Inferred geometries are those of torch's own layers, applied to every basis vector."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import specops
from specops import Conv, Dense, errors

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from specops_torch import geometry_of  # noqa: E402
from specops_torch.sizes import SizeRecorder  # noqa: E402


def layer_matrix(layer: nn.Module, channels: int, size: tuple[int, ...], **kwargs: Any) -> Any:
    """The layer without its bias, as a matrix."""
    n = channels * int(np.prod(size))
    basis = torch.eye(n, dtype=torch.float64).reshape(n, channels, *size)
    with torch.no_grad():
        zero = layer(torch.zeros(1, channels, *size, dtype=torch.float64), **kwargs)
        out = layer(basis, **kwargs) - zero
    return out.reshape(n, -1).T.numpy()


LAYERS: list[tuple[Any, int, tuple[int, ...]]] = [
    (nn.Conv1d(3, 4, 5, padding=2), 3, (7,)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), 4, (9,)),
    (nn.Conv2d(3, 4, 3, padding=1), 3, (5, 6)),
    (nn.Conv2d(3, 4, 3), 3, (5, 6)),
    (nn.Conv2d(3, 4, (2, 4), padding="same"), 3, (5, 6)),
    (nn.Conv2d(4, 4, 3, stride=(2, 1), padding=(1, 0), groups=4), 4, (6, 5)),
    (nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), 3, (4, 5)),
    (nn.Conv2d(3, 2, 3, stride=2, padding=1, padding_mode="circular"), 3, (4, 6)),
    (nn.Conv2d(3, 2, 4, stride=2, padding=1, padding_mode="circular"), 3, (4, 6)),
    (nn.Conv2d(2, 3, 2, stride=2), 2, (4, 6)),
    (nn.Conv2d(3, 2, 1, padding_mode="reflect"), 3, (4, 5)),
    (nn.Conv2d(3, 2, 1, padding="same", padding_mode="replicate"), 3, (4, 5)),
    (nn.Conv2d(3, 2, 3, padding="valid", padding_mode="circular"), 3, (4, 5)),
    (nn.Conv2d(2, 3, 2, stride=2, padding_mode="circular"), 2, (5, 6)),
    (nn.Conv3d(2, 2, 3, padding=1), 2, (3, 3, 2)),
    (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), 3, (4,)),
    (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), 3, (3, 4)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 3), dilation=(2, 1), groups=2), 4, (3, 2)),
    (nn.ConvTranspose3d(2, 2, 2, stride=2), 2, (2, 2, 2)),
]
_PADS_BY_A_COPY = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@_PADS_BY_A_COPY
@pytest.mark.parametrize(("layer", "channels", "size"), LAYERS, ids=lambda v: str(v)[:60])
def test_layers_are_what_their_geometry_says(
    layer: nn.Module, channels: int, size: tuple[int, ...]
) -> None:
    layer = layer.double()
    geometry = geometry_of(layer, input_shape=size)
    matrix = layer_matrix(layer, channels, size)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    w = layer.weight.detach()
    operator = specops.linear_operator(w, geometry)
    np.testing.assert_allclose(operator.to_matrix().numpy(), matrix, atol=1e-14)
    x = torch.randn(3, matrix.shape[1], dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(x), x @ torch.tensor(matrix).T)
    np.testing.assert_allclose(
        specops.singular_values(w, geometry).numpy(), sigma, atol=1e-12 * sigma[0]
    )
    assert float(specops.spectral_norm(w, geometry)) == pytest.approx(sigma[0], rel=1e-12)


@_PADS_BY_A_COPY
@pytest.mark.parametrize(("layer", "channels", "size"), LAYERS, ids=lambda v: str(v)[:60])
def test_recorder_learns_the_size(layer: Any, channels: int, size: tuple[int, ...]) -> None:
    layer = layer.double()
    recorder = SizeRecorder(layer.padding_mode == "circular")
    handle = layer.register_forward_hook(recorder, with_kwargs=True)
    layer(input=torch.zeros(2, channels, *size, dtype=torch.float64))
    handle.remove()
    assert recorder.geometry(layer) == geometry_of(layer, input_shape=size)


def test_recorder_follows_output_size_and_the_largest_input() -> None:
    layer = nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1).double()
    recorder = SizeRecorder(circular=False)
    layer.register_forward_hook(recorder, with_kwargs=True)
    matrix = layer_matrix(layer, 2, (3, 4), output_size=(6, 8))
    sigma = np.linalg.svd(matrix, compute_uv=False)
    geometry = recorder.geometry(layer)
    assert geometry.output_padding == (1, 1)
    assert float(specops.spectral_norm(layer.weight.detach(), geometry)) == pytest.approx(sigma[0])
    layer(torch.zeros(1, 2, 5, 2, dtype=torch.float64))
    assert recorder.geometry(layer).input_shape == (5, 4)
    circular = SizeRecorder(circular=True)
    layer = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")
    layer.register_forward_hook(circular, with_kwargs=True)
    layer(torch.zeros(1, 1, 4))
    assert circular.geometry(layer).input_shape == (4,)
    layer(torch.zeros(1, 1, 5))
    assert circular.geometry(layer).input_shape is None


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_attributes_may_change_later_and_be_single_numbers(kind: Any) -> None:
    layer = kind(2, 3, 3, padding=1, padding_mode="zeros").double()
    model = nn.Sequential(layer)
    attachment = specops.attach(None, model, specops.ClipSpectralNorm(0.5))
    model(torch.zeros(1, 2, 4, 5, dtype=torch.float64))
    attachment.step()
    layer.stride, layer.dilation, layer.padding = 1, 2, (2, 2)
    if kind is nn.ConvTranspose2d:
        layer.stride = 2
    layer.weight.data *= 3
    model(torch.zeros(1, 2, 4, 5, dtype=torch.float64))
    for act in (lambda: None, attachment.enforce):
        act()
        sigma = np.linalg.svd(layer_matrix(layer, 2, (4, 5)), compute_uv=False)
        assert attachment.report()["0.weight"].norm == pytest.approx(sigma[0])
    assert sigma[0] == pytest.approx(0.5)


def test_a_circular_layer_may_have_single_numbers() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    known = geometry_of(layer, input_shape=(4, 5))
    layer.stride = layer.dilation = layer.padding = 1
    assert geometry_of(layer, input_shape=(4, 5)) == known


def test_where_nothing_is_padded_the_mode_says_nothing() -> None:
    unpadded = nn.Conv2d(3, 2, 3, padding_mode="reflect")
    assert geometry_of(unpadded) == geometry_of(nn.Conv2d(3, 2, 3))
    pointwise = nn.Conv2d(3, 2, 1, padding="valid", padding_mode="circular")
    assert geometry_of(pointwise, input_shape=(4, 5)).boundary == "circular"  # all values known


def test_other_layers() -> None:
    assert geometry_of(nn.Linear(3, 2)) == Dense()
    assert geometry_of(nn.Embedding(5, 3)) == Dense()
    assert geometry_of(nn.LSTM(3, 4), "weight_ih_l0") == Dense(splits=(4, 4, 4, 4))
    assert geometry_of(nn.GRU(3, 4), "weight_hh_l0") == Dense(splits=(4, 4, 4))
    assert geometry_of(nn.RNN(3, 4), "weight_hh_l0") == Dense()
    assert geometry_of(nn.LSTMCell(3, 4), "weight_hh") == Dense(splits=(4, 4, 4, 4))
    attention = nn.MultiheadAttention(6, 2)
    assert geometry_of(attention, "in_proj_weight") == Dense(splits=(6, 6, 6))
    assert geometry_of(attention.out_proj) == Dense()
    assert geometry_of(nn.Conv2d(3, 4, 3)) == Conv(None, padding=0)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "no convolution on a torus"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), "no convolution on a torus"),
        (nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), "does not give n/stride"),
        (nn.Conv2d(3, 4, 2, padding=(0, 1), padding_mode="reflect"), "no convolution on a torus"),
        (nn.Conv2d(3, 4, (1, 2), padding="same", padding_mode="reflect"), "on a torus"),
        (nn.Bilinear(2, 3, 4), "no geometry is known"),
    ],
)
def test_layers_that_are_refused(layer: Any, message: str) -> None:
    with pytest.raises(errors.UnsupportedGeometryError, match=message):
        geometry_of(layer)


@pytest.mark.parametrize(
    ("boundary", "declared", "met", "told"),
    [
        ("zeros", 4, 6, True),
        ("zeros", 6, 4, False),
        ("zeros", 6, 6, False),
        ("zeros", None, 6, False),
        ("circular", 6, 4, True),
        ("circular", 6, 6, False),
    ],
)
def test_inputs_that_a_declared_map_is_not_of_are_told_once(
    boundary: Any, declared: int | None, met: int, told: bool
) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode=boundary)
    given = None if declared is None else (declared, declared)
    maps = {"weight": Conv(given, padding="same", boundary=boundary)}
    attachment = specops.attach(None, layer, specops.ClipSpectralNorm(1.0), geometries=maps)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            layer(torch.ones(1, 2, met, met))
    assert [str(w.message).startswith("weight was declared") for w in seen] == [True] * told
    attachment.detach()
    assert not layer._forward_hooks
