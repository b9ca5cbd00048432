"""The only floor that tells array libraries apart.

Algorithms see a namespace `xp` of the Array API standard, its arrays, and the functions below.
`standard.py` says how each of them is done with the standard alone; what one library does
better, or only can do otherwise, stands in the file of its name. `libraries.py` finds it.
"""

from specops.arrays.dtypes import (
    complex_dtype,
    double_dtype,
    dtype_name,
    epsilon,
    is_complex,
    real_dtype,
    rounded,
    to_compute,
)
from specops.arrays.entries import (
    add_at,
    add_diagonal,
    adjoint,
    all_finite,
    argmax,
    check_finite,
    complex_of,
    conjugate,
    largest_entry,
    magnitude,
    power_below,
)
from specops.arrays.entry import entry
from specops.arrays.kinds import is_array, namespace
from specops.arrays.placement import (
    by_workers,
    constant,
    device_of,
    from_host,
    in_double,
    is_constant_on_host,
    like,
    on_host,
    seen,
    solves_alone,
    start_vector,
    to_numpy,
    zeros,
)
from specops.arrays.products import along_axis, ieee_products, in_full_precision, matmul
from specops.arrays.records import record
from specops.arrays.solvers import has_cholesky, try_cholesky
from specops.arrays.tracing import (
    compiled,
    cond,
    expanded,
    fori,
    is_concrete,
    is_staged,
    is_traced,
    stop_gradient,
    truth,
    while_loop,
    with_derivative,
)

__all__ = [
    "add_at",
    "add_diagonal",
    "adjoint",
    "all_finite",
    "along_axis",
    "argmax",
    "by_workers",
    "check_finite",
    "compiled",
    "complex_dtype",
    "complex_of",
    "cond",
    "conjugate",
    "constant",
    "device_of",
    "double_dtype",
    "dtype_name",
    "entry",
    "epsilon",
    "expanded",
    "fori",
    "from_host",
    "has_cholesky",
    "ieee_products",
    "in_double",
    "in_full_precision",
    "is_array",
    "is_complex",
    "is_concrete",
    "is_constant_on_host",
    "is_staged",
    "is_traced",
    "largest_entry",
    "like",
    "magnitude",
    "matmul",
    "namespace",
    "on_host",
    "power_below",
    "real_dtype",
    "record",
    "rounded",
    "seen",
    "solves_alone",
    "start_vector",
    "stop_gradient",
    "to_compute",
    "to_numpy",
    "truth",
    "try_cholesky",
    "while_loop",
    "with_derivative",
    "zeros",
]
