"""`inspect`: the command `specops inspect` as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, get_args

from specops.geometry import Conv
from specops.geometry.arguments import check_choice, integers
from specops.inspection.figures import Method
from specops.inspection.hints import Hints
from specops.inspection.results import Inspection
from specops.inspection.run import inspect_checkpoint

_Padding = int | Literal["same", "valid"]


def inspect(
    path: str | PathLike[str],
    *,
    input_size: int | tuple[int, ...] | Mapping[str, int | tuple[int, ...]] | None = None,
    stride: int | Mapping[str, int] | None = None,
    dilation: int | Mapping[str, int] | None = None,
    padding: _Padding | Mapping[str, _Padding] | None = None,
    groups: int | Mapping[str, int] | None = None,
    boundary: Literal["zeros", "circular"] = "zeros",
    layout: Literal["torch", "jax", "keras", ""] = "",
    method: Method = "auto",
    exclude: Sequence[str] = (),
) -> Inspection:
    """The spectral figures of every weight in a checkpoint, as ``specops inspect`` has them.

    Parameters
    ----------
    path : path
        A file or folder of safetensors, torch, torch.distributed.checkpoint, NumPy, Keras, flax,
        equinox, orbax or Hugging Face.
    input_size, stride, dilation, padding, groups : value, or dict of str to value, optional
        What checkpoints do not state about convolutions. A single value is for all of them; a dict
        gives values by patterns of tensor names, of which the last that matches counts. A
        padding is "same", "valid" or, as in torch, a number of zeros on both sides. Without an
        input size the norm is the supremum over all sizes, whatever the padding.
    boundary : "zeros" or "circular"
        How convolutions with an input size are padded.
    layout : "torch", "jax" or "keras", optional
        The library whose order a kernel's axes have, if the file does not tell.
    method : "auto", "exact" or "bounds"
        Compute all singular values, or certified bounds of the largest one alone. "auto" is
        "bounds" for matrices whose smaller side exceeds 2048.
    exclude : sequence of str
        Patterns of names of tensors to leave alone.

    Returns
    -------
    Inspection
        Its ``measured`` is a list of `specops.inspection.WeightFigures`, each with ``name``,
        ``geometry``, ``why`` and ``figures``: ``sigma_max``, a number or (lower, upper),
        ``stable_rank``, ``spectrum`` and so on. Weights that may be several maps have them in
        ``readings``. `specops.inspection.show` prints it, ``as_json`` and ``as_html`` write it,
        ``compare`` matches two.

    Raises
    ------
    CheckpointError
        The file cannot be read at all. Parts that cannot be read are listed in ``problems``.
    ValueError
        A pattern matches no tensor, or an argument has a wrong type, sign or name.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/model.npz", weight=np.diag([3.0, 4.0]))
    ...     (found,) = inspect(f"{folder}/model.npz").measured
    >>> found.name, found.figures.sigma_max, found.figures.stable_rank
    ('weight', 4.0, 1.5625)
    """
    check_choice(method, "method", get_args(Method))
    check_choice(boundary, "boundary", ("zeros", "circular"))
    check_choice(layout, "layout", ("torch", "jax", "keras", ""))
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a sequence of patterns: give [{exclude!r}]")
    sizes = {k: integers(v, "input_size", least=1) for k, v in _table(input_size).items()}
    hints = Hints(
        input_size=sizes,
        stride=_of_conv("stride", stride),
        dilation=_of_conv("dilation", dilation),
        padding=_of_conv("padding", padding),
        groups=_of_conv("groups", groups),
        boundary=boundary,
        layout=layout,
        exclude=tuple(exclude),
    )
    return inspect_checkpoint(path, hints, method=method)


def _of_conv(name: str, given: Any) -> dict[str, Any]:
    """The values by pattern, as `Conv` checks and stores the argument of this name."""
    conv: Any = Conv
    return {k: getattr(conv(None, **{name: v}), name) for k, v in _table(given).items()}


def _table(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else {"*": given}
