"""Operators of adapters on a small ReLU network, against explicit derivatives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import specops_jax
import specops_torch
from specops import errors, measures
from tests.measures import networks
from tests.measures.networks import BIASES, LABELS, WEIGHTS, X


@pytest.fixture(autouse=True)
def _doubles() -> Any:
    with jax.enable_x64(True):
        yield


def torch_model() -> nn.Sequential:
    layers: list[nn.Module] = []
    for w, b in zip(WEIGHTS, BIASES, strict=True):
        layer = nn.Linear(w.shape[1], w.shape[0]).double()
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(w))
            layer.bias.copy_(torch.from_numpy(b))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def of_torch() -> Any:
    model = torch_model()
    x, y = torch.from_numpy(X), torch.from_numpy(LABELS)
    loss = nn.functional.cross_entropy

    def margins() -> Any:
        return specops_torch.margin_jacobians(model, x, y, ["1", "3"])

    return SimpleNamespace(
        jacobian=lambda i: specops_torch.jacobian_operator(lambda v: model(v[None])[0], x[i]),
        hessian=specops_torch.hessian_operator(lambda: loss(model(x), y), model.parameters()),
        halves=specops_torch.hessian_operator(
            [lambda: loss(model(x[:3]), y[:3]), lambda: loss(model(x[3:6]), y[3:6])],
            model.parameters(),
        ),
        first_six=specops_torch.hessian_operator(
            lambda: loss(model(x[:6]), y[:6]), model.parameters()
        ),
        input_norms=specops_torch.input_gradient_norms(
            lambda x: loss(model(x), y, reduction="none"), x
        ),
        margins=margins,
        array=lambda v: torch.from_numpy(np.ascontiguousarray(v)),
    )


def of_jax() -> Any:
    params = [(jnp.asarray(w), jnp.asarray(b)) for w, b in zip(WEIGHTS, BIASES, strict=True)]
    x, y = jnp.asarray(X), jnp.asarray(LABELS)

    def apply(params: Any, x: Any) -> Any:
        return networks.logits(x, *zip(*params, strict=True), jax.nn.relu)

    def losses(params: Any, x: Any, y: Any) -> Any:
        z = apply(params, x)
        return jax.nn.logsumexp(z, axis=1) - z[jnp.arange(len(y)), y]

    def mean(a: int, b: int) -> Any:
        return lambda params: jnp.mean(losses(params, x[a:b], y[a:b]))

    stages = [
        lambda x: jax.nn.relu(x @ params[0][0].T + params[0][1]),
        lambda x: jax.nn.relu(x @ params[1][0].T + params[1][1]),
        lambda x: x @ params[2][0].T + params[2][1],
    ]
    return SimpleNamespace(
        jacobian=lambda i: specops_jax.jacobian_operator(lambda v: apply(params, v[None])[0], x[i]),
        hessian=specops_jax.hessian_operator(mean(0, 9), params),
        halves=specops_jax.hessian_operator([mean(0, 3), mean(3, 6)], params),
        first_six=specops_jax.hessian_operator(mean(0, 6), params),
        input_norms=specops_jax.input_gradient_norms(lambda x: losses(params, x, y), x),
        margins=lambda: specops_jax.margin_jacobians(stages, x, y),
        array=jnp.asarray,
    )


@pytest.fixture(params=["torch", "jax"])
def kind(request: Any) -> Any:
    return {"torch": of_torch, "jax": of_jax}[request.param]()


def explicit_hessian() -> np.ndarray:
    """By central differences of gradients, which are differences of losses along two axes."""
    model = torch_model()
    x, y = torch.from_numpy(X), torch.from_numpy(LABELS)
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(v: torch.Tensor) -> torch.Tensor:
        parts = v.split([s.numel() for s in shapes])
        values = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        z = torch.func.functional_call(model, values, (x,))
        return nn.functional.cross_entropy(z, y)

    def gradient(v: torch.Tensor) -> torch.Tensor:
        v = v.clone().requires_grad_()
        return torch.autograd.grad(loss(v), v)[0]

    columns = [
        (gradient(flat + 1e-5 * e) - gradient(flat - 1e-5 * e)) / 2e-5
        for e in torch.eye(len(flat), dtype=torch.float64)
    ]
    return torch.stack(columns).numpy()


def explicit(operator: Any, kind: Any, method: str = "matvec") -> np.ndarray:
    size = operator.shape[1 if method == "matvec" else 0]
    columns = [getattr(operator, method)(kind.array(e)) for e in np.eye(size)]
    return np.stack([np.asarray(c) for c in columns], axis=1)


def test_a_jacobian_is_the_explicit_one(kind: Any) -> None:
    for i in (0, 4):
        operator, expected = kind.jacobian(i), networks.jacobian(X[i])
        assert operator.shape == (3, 5)
        assert isinstance(operator, measures.JacobianOperator)
        np.testing.assert_allclose(explicit(operator, kind), expected, atol=1e-12)
        np.testing.assert_allclose(explicit(operator, kind, "rmatvec"), expected.T, atol=1e-12)
        found = measures.local_lipschitz(operator, tolerance=1e-8)
        assert found.value == pytest.approx(np.linalg.norm(expected, 2), rel=1e-7)


def test_a_hessian_is_the_explicit_one(kind: Any) -> None:
    expected = explicit_hessian()
    got = explicit(kind.hessian, kind)
    order = np.arange(len(got))
    np.testing.assert_allclose(got, expected[np.ix_(order, order)], atol=1e-6)
    ends = measures.spectrum_ends(kind.hessian, tolerance=1e-8)
    values = np.linalg.eigvalsh(expected)
    assert ends.largest == pytest.approx(values[-1], abs=1e-6)
    assert ends.smallest == pytest.approx(values[0], abs=1e-6)


def test_the_mean_over_batches_counts(kind: Any) -> None:
    np.testing.assert_allclose(
        explicit(kind.halves, kind), explicit(kind.first_six, kind), atol=1e-12
    )


def test_gradients_by_inputs(kind: Any) -> None:
    for i, got in enumerate(np.asarray(kind.input_norms)):
        up, down = (
            networks.cross_entropy(networks.forward(X[i] + h * np.eye(5))[-1], LABELS[i])
            for h in (1e-6, -1e-6)
        )
        assert got == pytest.approx(np.linalg.norm((up - down) / 2e-6), rel=1e-5)


def test_jac_norm_by_its_definition(kind: Any) -> None:
    found = kind.margins()
    layers = networks.forward(X)
    rows = np.arange(len(X))
    rest = layers[-1].copy()
    rest[rows, LABELS] = -np.inf
    expected = layers[-1][rows, LABELS] - rest.max(axis=1)
    np.testing.assert_allclose(np.asarray(found.margins), expected, atol=1e-12)
    for i in range(len(X)):
        hidden = [np.maximum(h[i], 0) for h in layers[:-1]]
        np.testing.assert_allclose(
            np.asarray(found.hidden_norms)[:, i], [np.linalg.norm(h) for h in hidden], atol=1e-12
        )
        direction = np.zeros(3)
        direction[LABELS[i]], direction[rest[i].argmax()] = 1.0, -1.0
        norms = [np.linalg.norm(direction @ networks.jacobian(X[i], start)) for start in (1, 2)]
        np.testing.assert_allclose(np.asarray(found.jacobian_norms)[:, i], norms, atol=1e-12)
    logs = np.asarray(measures.log_jac_norm(*found))
    sums = (np.asarray(found.hidden_norms) * np.asarray(found.jacobian_norms)).sum(0)
    good = expected > 0
    np.testing.assert_allclose(np.exp(logs[good]), (sums / expected)[good])
    assert np.isinf(logs[~good]).all()
    assert good.any()


def test_what_ran_without_gradients_is_refused_and_linear_losses_are_flat() -> None:
    @torch.no_grad()
    def silent(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    for function in (silent, lambda x: torch.ones(2), lambda x: x.detach()):
        with pytest.raises(errors.AdapterError, match="without gradients"):
            specops_torch.jacobian_operator(function, torch.ones(3))
    with torch.inference_mode():
        found = specops_torch.jacobian_operator(lambda x: 2 * x, torch.ones(3))
    assert measures.local_lipschitz(found).value == pytest.approx(2.0)
    w = torch.ones(3, requires_grad=True)
    linear = specops_torch.hessian_operator(lambda: w.sum(), [w])
    assert float(linear.matvec(torch.ones(3)).abs().max()) == 0.0


def test_a_hessian_follows_its_parameters() -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    operator = specops_torch.hessian_operator(lambda: (w**4).sum(), [w])
    first = operator.matvec(torch.ones(2, dtype=torch.float64))
    with torch.no_grad():
        w.mul_(2.0)
    second = operator.matvec(torch.ones(2, dtype=torch.float64))
    np.testing.assert_allclose(first, [12.0, 12.0])
    np.testing.assert_allclose(second, [48.0, 48.0])


def test_a_parameter_that_two_modules_share_counts_once() -> None:
    w = torch.ones(2, requires_grad=True)
    hessian = specops_torch.hessian_operator(lambda: (w**2).sum(), [w, w])
    assert hessian.shape == (2, 2)
    assert measures.spectrum_ends(hessian).largest == pytest.approx(2.0)


def test_a_hessian_follows_what_is_written_through_data() -> None:
    w = torch.zeros(1, requires_grad=True)
    hessian = specops_torch.hessian_operator(lambda: w.exp().sum(), [w])
    assert hessian.matvec(torch.ones(1)).item() == 1.0
    w.data.fill_(1.0)
    assert hessian.matvec(torch.ones(1)).item() == pytest.approx(np.e)


def test_margins_are_differentiated_in_inference_mode_too() -> None:
    model, y = torch_model(), torch.from_numpy(LABELS)
    expected = specops_torch.margin_jacobians(model, torch.from_numpy(X), y)
    with torch.inference_mode():
        x = torch.from_numpy(X).clone()
        found = specops_torch.margin_jacobians(model, x, y)
    torch.testing.assert_close(tuple(found), tuple(expected))


def test_hidden_layers_are_those_before_they_are_written_to() -> None:
    x, y = torch.from_numpy(X), torch.from_numpy(LABELS)
    plain, inplace = torch_model(), torch_model()
    for index in (1, 3):
        inplace[index] = nn.ReLU(inplace=True)
    for model in (plain, inplace):
        for p in model.parameters():
            p.requires_grad_(False)
    found = [specops_torch.margin_jacobians(m, x, y, ["0", "2"]) for m in (plain, inplace)]
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_mean_losses_are_refused(kind: Any) -> None:
    x = kind.array(X)
    mean = (lambda x: x.mean()) if isinstance(x, torch.Tensor) else (lambda x: jnp.mean(x))
    package = specops_torch if isinstance(x, torch.Tensor) else specops_jax
    with pytest.raises(errors.AdapterError, match=r"of shape \(9,\)"):
        package.input_gradient_norms(mean, x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("package", ["torch", "jax"])
def test_half_precision_is_measured_in_single(package: str, dtype: str) -> None:
    if package == "torch":
        a = torch.tensor([[300.0, 0], [0, 4.0]], dtype=getattr(torch, dtype))
        x = torch.ones(2, dtype=a.dtype)
        operator: Any = specops_torch.jacobian_operator(lambda x: a @ x, x)
    else:
        a = jnp.array([[300.0, 0], [0, 4.0]], dtype=dtype)
        operator = specops_jax.jacobian_operator(lambda x: a @ x, jnp.ones(2, dtype))
    found = measures.local_lipschitz(operator)
    assert found.value == pytest.approx(300.0, rel=1e-2 if dtype != "float32" else 1e-5)
    assert found.error < 3.0


def test_what_cannot_be_differentiated_is_refused() -> None:
    with pytest.raises(errors.AdapterError, match="no parameter"):
        specops_torch.hessian_operator(lambda: torch.ones(()), [torch.ones(3)])
    with pytest.raises(errors.AdapterError, match="no loss"):
        specops_torch.hessian_operator([], [torch.ones(3, requires_grad=True)])
    with pytest.raises(errors.AdapterError, match="no loss"):
        specops_jax.hessian_operator([], {"w": jnp.ones(3)})
    with pytest.raises(errors.AdapterError, match="no parameter"):
        specops_jax.hessian_operator(lambda p: 0.0, {})
    with pytest.raises(errors.AdapterError, match="two stages"):
        specops_jax.margin_jacobians([lambda x: x], jnp.ones((2, 3)), jnp.zeros(2, int))
    model, x, y = torch_model(), torch.from_numpy(X), torch.from_numpy(LABELS)
    with pytest.raises(errors.AdapterError, match="no such modules: nine"):
        specops_torch.margin_jacobians(model, x, y, ["nine"])
    twice = nn.Sequential(model[0], nn.ReLU(), model[2], model[4])
    shared = nn.Sequential(twice[0], nn.Linear(8, 5).double(), twice[0], *model[1:])
    with pytest.raises(errors.AdapterError, match="ran twice"):
        specops_torch.margin_jacobians(shared, x, y, ["0"])
    assert not model[0]._forward_hooks


def test_the_model_keeps_its_mode_and_gradients() -> None:
    model = torch_model().train()
    found = specops_torch.margin_jacobians(model, torch.from_numpy(X), torch.from_numpy(LABELS))
    assert found.hidden_norms.shape == (2, 9)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
