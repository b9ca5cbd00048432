"""Linear layers under a spectral normalisation: products take the factor, nobody notices."""

from __future__ import annotations

from typing import Any

import pytest

import specops
from specops import SpectralNormalization

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

from specops_torch import linear  # noqa: E402

WIDE = (300, 260)
"""More entries than a small layer has."""


def attached(
    shape: tuple[int, int] = WIDE, *, bias: bool = True, scale: float = 1.3, layer: Any = nn.Linear
) -> tuple[nn.Module, Any]:
    """(a layer under the rule in double precision, what it should compute, differentiable)."""
    torch.manual_seed(0)
    module = layer(shape[1], shape[0], bias=bias).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    rule = SpectralNormalization(norm="reshaped", scale=scale)
    attachment = specops.attach(optimizer, module, rule)
    state = attachment.state_dict()["weights"]["weight"]["state"]
    u, v = state["u0"], state["v0"]

    def expected(x: Any) -> Any:
        w = module.weight
        return nn.functional.linear(x, w * (scale / torch.dot(u, w @ v)), module.bias)

    return module, expected


def inputs(*shape: int) -> Any:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(y: Any, of: list[Any], **options: Any) -> Any:
    return torch.autograd.grad(
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum(), of, **options
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [WIDE, (5, 7)], ids=["large", "small"])
@pytest.mark.parametrize("rows", [(4,), (2, 3), (700,), (0,)], ids=str)
def test_values_and_both_derivatives(
    shape: tuple[int, int], bias: bool, rows: tuple[int, ...]
) -> None:
    module, expected = attached(shape, bias=bias)
    x = inputs(*rows, shape[1])
    of = [x, *module.parameters()]
    torch.testing.assert_close(module(x), expected(x))
    for ours, theirs in zip(gradients(module(x), of), gradients(expected(x), of), strict=True):
        torch.testing.assert_close(ours, theirs)
    twice = []
    for function in (module, expected):
        first = gradients(function(x).sin(), of, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), of))
    for ours, theirs in zip(*twice, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_large_layers_never_make_the_divided_weight(monkeypatch: Any) -> None:
    module, _ = attached()

    def refuse(*parts: Any) -> Any:
        raise AssertionError("the divided weight was made")

    monkeypatch.setattr(linear, "divide_matrix", refuse)
    module(inputs(4, WIDE[1])).sum().backward()


def test_a_gradient_of_inputs_takes_no_product_for_weights(monkeypatch: Any) -> None:
    module, expected = attached()
    x, products = inputs(4, WIDE[1]), []
    product = linear._product
    monkeypatch.setattr(linear, "_product", lambda *a: products.append(a) or product(*a))
    y = module(x)
    torch.testing.assert_close(gradients(y, [x])[0], gradients(expected(x), [x])[0])
    assert len(products) == 1
    y = module(x)
    gradients(y, [module.weight])
    assert len(products) == 2
    module(x.detach()).sum().backward()
    assert len(products) == 3
    module(x).sum().backward()
    assert len(products) == 5


# torch imports decompositions for forward derivatives, which it scripts.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_several_gradients_at_once_and_forward_derivatives() -> None:
    for shape in (WIDE, (5, 7)):
        module, expected = attached(shape)
        x = inputs(2, shape[1])
        for of in (x, module.weight):
            several = torch.randn(3, 2, shape[0], dtype=torch.float64)
            ours, theirs = (
                torch.autograd.grad(f(x), of, several, is_grads_batched=True)[0]
                for f in (module, expected)
            )
            torch.testing.assert_close(ours, theirs)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), x.detach().sin())
            ours, theirs = (forward_ad.unpack_dual(f(dual)).tangent for f in (module, expected))
        torch.testing.assert_close(ours, theirs)
        rows = torch.func.vmap(torch.func.jacrev(module))(x.detach())
        torch.testing.assert_close(rows[0], torch.func.jacrev(expected)(x.detach()[0]))


def test_what_follows_may_work_in_place() -> None:
    module, expected = attached()
    for rows in ((4,), (2, 2)):
        x = inputs(*rows, WIDE[1])
        ours = nn.functional.relu(module(x), inplace=True)
        torch.testing.assert_close(ours, expected(x).relu())
        torch.testing.assert_close(gradients(ours, [x])[0], gradients(expected(x).relu(), [x])[0])


class Doubled(nn.Linear):
    """A layer with a forward of its own, which looks at its weight."""

    def forward(self, x: Any) -> Any:
        assert isinstance(self.weight, torch.Tensor)
        return nn.functional.linear(x, self.weight, self.bias) * 2.0


def test_others_who_look_at_the_weight_see_a_tensor() -> None:
    module, expected = attached(layer=Doubled)
    x = inputs(4, WIDE[1])
    torch.testing.assert_close(module(x), 2.0 * expected(x))
    module, expected = attached()
    seen = []
    handle = module.register_forward_pre_hook(lambda m, a: seen.append(m.weight))
    module.register_forward_hook(lambda m, a, y: seen.append(m.weight))
    torch.testing.assert_close(module(x), expected(x))
    assert all(isinstance(w, torch.Tensor) for w in seen)
    assert len(seen) == 2
    handle.remove()
    every = nn.modules.module.register_module_forward_pre_hook(lambda m, a: seen.append(m.weight))
    try:
        module(x)
    finally:
        every.remove()
    assert isinstance(seen[2], torch.Tensor)


def test_autocast_and_inputs_of_other_dtypes() -> None:
    module, _ = attached()
    module.float()
    x = torch.randn(4, WIDE[1])
    plain = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), plain, rtol=0.05, atol=0.05)
    assert module.weight.grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match="dtype"):
        module(x.double())
    torch.testing.assert_close(module(x[0]), plain[0])


def test_whatever_else_comes_across_the_weight_gets_the_tensor() -> None:
    w = torch.eye(3, dtype=torch.float64)
    u, v = w[0].clone(), w[0].clone()
    stand_in = linear.DividedWeight(2.0 * w, 2.0, 0.5, u, v)
    torch.testing.assert_close(torch.matmul(stand_in, w), 0.5 * w)
    torch.testing.assert_close(nn.functional.linear(w, weight=stand_in), 0.5 * w)
    assert stand_in.shape == (3, 3)
    assert stand_in.norm().item() == pytest.approx(0.5 * 3**0.5)
