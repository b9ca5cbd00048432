"""The weight that a layer uses under a forward rule, computed from the raw parameter.

Forward passes change nothing: optimizer steps advance the singular vectors.
"""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch
from torch import nn

from specops.errors import GeometryError, NonFiniteError
from specops.geometry import Geometry
from specops.tracking import Tracked, is_measured, saw_zeros
from specops.training.weight import is_misfit
from specops_torch import fused
from specops_torch.sizes import SizeRecorder
from specops_torch.weight_in_use import WeightInUse
from specops_torch.writes import fingerprint, is_reset, sample, written

State = dict[str, torch.Tensor]
_FORGOTTEN = (-1, -1)
_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


class InUse:
    """One weight's rule, vectors and scale, as the layers that hold it need them.

    The vectors belong to one tensor, the layer's own parameter, in its latest version. If anything
    but the optimizer's step has written to it since, they are measured anew. Any other tensor in
    its place (in a functional call, a replica, a mapped stack) is measured at each use. The object
    refers to no module and no optimizer, so that a model that carries it can be copied and
    pickled.

    Parameters
    ----------
    rule : rule of stage "forward"
    name : str
        The parameter's path.
    geometry : Dense or Conv
    recorder : SizeRecorder or None
        Records the input sizes of a convolution; None for other layers.
    lenient : bool
        Whether a geometry that does not fit is a reason to leave the weight alone.
    """

    def __init__(
        self,
        rule: Any,
        name: str,
        geometry: Geometry,
        recorder: SizeRecorder | None,
        *,
        lenient: bool = False,
    ) -> None:
        self.rule, self.name, self.geometry, self.recorder = rule, name, geometry, recorder
        self.lenient = lenient
        self.state: State | None = None
        self.overrides: dict[str, Any] = {}
        """Keyword arguments for the rule's `apply`: the values of schedules and trained scales,
        and the next step for rules that take it."""
        self.sharing: list[torch.Tensor] | None = None
        """The weights of all layers that share this trained scale."""
        self.ran = False
        self.drifting = False
        """Whether steps have changed the weight since its vectors were advanced."""
        self.searching = False
        """Whether an optimizer evaluates a closure, so that writes in between are its steps."""
        self.sharded = False
        """Whether the parameter is a DTensor, which layers see gathered."""
        self.reduced = False
        """Whether `fully_shard` has reduced the weight's gradient of the same backward pass."""
        self.asked_by: int | None = None
        """The thread in which torch asks whether the attribute's name is taken."""
        self._loaded: tuple[int, int] | None = None
        self._saw_zeros = False
        """Whether the vectors were found for a weight of zeros, such as a new head's."""
        self._own: torch.Tensor | None = None
        self._written: tuple[int, int] | None = None
        self.copied = False
        """Whether the model was copied or unpickled, so that nothing says when it is written to."""
        self.compiled = False
        """Whether compiled code uses the weight."""
        self._copied: tuple[float, ...] | None = None
        """In a copy: the fingerprint of the weight that the vectors belong to."""
        self._sample: bytes | None = None
        """Some entries of the parameter when the vectors were advanced on it."""
        self._kind: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        own = self._own
        fresh = own is not None and self._written == written(own)
        whole = own is not None and fresh and not self.sharded
        copied = fingerprint(own) if whole else self._copied
        return {
            **self.__dict__,
            "searching": False,
            "asked_by": None,
            "sharing": None,
            "_own": None,
            "_written": None,
            "_kind": (),
            "copied": True,
            "compiled": False,
            "_copied": copied,
        }

    # Reading

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """The weight in use."""
        compiling = torch.compiler.is_compiling()
        plain = compiling or (type(raw) is nn.Parameter and not raw.is_meta)
        if not plain and (raw.is_meta or hasattr(raw, "device_mesh")):
            # A meta tensor has no values. A DTensor is a part of the weight, which engines look
            # at between forward passes; the next step refuses it, by name.
            return raw
        if not compiling:
            if self.asked_by == get_ident():
                return raw
            self._clear_scale(raw)
        self.ran = True
        device = raw.device.type
        if torch.is_autocast_enabled(device):
            # Autocast off for the backward pass as well, which may run under it.
            with torch.autocast(device, enabled=False):
                return self._used(raw)
        return self._used(raw)

    def _clear_scale(self, raw: torch.Tensor) -> None:
        """Reset a trained scale's gradient with its weight's: `zero_grad` does not know it."""
        scale = self.overrides.get("scale")
        if scale is None or not scale.is_leaf or not self._is_own(raw):
            return
        waits = self.sharded and not self.reduced
        if scale.grad is None or (not waits and all(map(is_reset, self.sharing or [raw]))):
            scale.grad, self.reduced = None, False

    def _used(self, raw: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            self.compiled = True
            unseen = self.is_replaced(self._source(raw)) or (self.copied and not _exporting())
            if unseen and torch.compiler.is_dynamo_compiling():
                return self._outside(raw)
            if self.state is None:
                self.measure(raw)
            return raw if self.state is None else self._applied(raw, self.state)
        if not self._is_own(raw):
            return self._of_another(raw)
        if self._written != written(self._source(raw)):
            self._look(raw)
        state = self.state
        as_measured = self._is_as_measured(raw, state)
        if as_measured is False and not self._fits(raw, state):
            # Something has written to it in a way that torch does not count.
            self.measure(raw)
            state = self.state
        if state is None:
            return raw  # not finite: the next step applies the user's policy
        assert isinstance(raw, nn.Parameter)
        kind, used = self._fused(), None
        if kind is not None:
            used = fused.used(raw, kind, self, state, as_measured=bool(as_measured))
        return WeightInUse.of(self._applied(raw, state) if used is None else used, raw)

    @torch.compiler.disable
    def _outside(self, raw: torch.Tensor) -> torch.Tensor:
        """The weight in use as computed outside of a compiled graph, which looks at no writes."""
        return self._used(raw)

    def _of_another(self, raw: torch.Tensor) -> torch.Tensor:
        """The weight in use where another tensor stands for the layer's own: measured by itself."""
        state = self._measured(raw)
        return raw if state is None else self._applied(raw, state)

    def _plain(self, raw: torch.Tensor, state: State) -> torch.Tensor:
        """The weight in use as the rule computes it, without a fused path."""
        options: dict[str, Any] = dict(self.overrides)
        if "scale" in options and not raw.requires_grad:
            # A frozen layer trains no scale.
            options["scale"] = options["scale"].detach()
        used: torch.Tensor = self.rule.apply(raw, self.geometry, state, name=self.name, **options)
        return used

    def _applied(self, raw: torch.Tensor, state: State) -> torch.Tensor:
        compute = self._plain if self.rule.is_traceable(self.geometry) else self._interpreted
        return compute(raw, state)

    _interpreted = torch.compiler.disable(_plain)
    """`_plain` for rules that need tables, which a compiler cannot trace."""

    def _fused(self) -> Any:
        if not self._kind or self._kind[0] is not self.geometry:
            self._kind = (self.geometry, fused.kind_of(self.rule, self.geometry))
        return self._kind[1]

    # Freshness

    @property
    def _follow(self) -> Tracked | None:
        return self.rule.tracked(self.geometry)  # type: ignore[no-any-return]

    def _source(self, raw: torch.Tensor) -> torch.Tensor:
        """The parameter whose writes count: for a gathered one, the sharded parameter."""
        return self._own if self.sharded and self._own is not None else raw

    def _is_own(self, raw: torch.Tensor) -> bool:
        if self.sharded:
            return type(raw) is nn.Parameter
        if self._own is None:
            # In a copied model, the first parameter that comes is the layer's own.
            if not isinstance(raw, nn.Parameter):
                return False
            self._own = raw
        # A parameter in the place of this one is measured at each use, until a step finds it there:
        # an engine may put one there for a forward pass, and change it without a counted write.
        return self._own is raw

    def _look(self, raw: torch.Tensor) -> None:
        """Decide what a parameter that changed since its vectors were found means for them."""
        stepping = self.searching and self.state is not None and not self.forgotten
        now = written(self._source(raw))
        if self._loaded == now and not self.forgotten and self._fits(raw, self.state):
            self._loaded, self._written = None, now
        elif stepping or (self.state is not None and self._follow is None):
            self.drifting, self._written, self._sample = True, now, None
        elif self._written is None and self._copied and self._copied == fingerprint(raw):
            # The parameter was copied together with the vectors, and not written to since.
            self._written, self._copied = written(raw), None
        else:
            self.measure(raw)

    @torch.compiler.disable
    def measure(self, raw: torch.Tensor) -> None:
        """Find the leading pairs of the parameter as it is."""
        source = self._source(raw)
        since, state = written(source), self._measured(raw)
        if state is not None:
            self.take(state, source, since)
            self._saw_zeros = self._is_of_zeros(state)

    def loaded(self, raw: torch.Tensor) -> None:
        """A checkpoint may have been loaded, at which compiled code will not look."""
        looks = self.compiled and not self.sharded and self._is_own(raw)
        if looks and self._written != written(raw):
            self._look(raw)

    def wait_for(self, own: torch.Tensor) -> None:
        """Measure a sharded parameter when its layer first sees it gathered."""
        self.take(None, own)
        self.sharded, self._written = True, None

    def of_whole(self, whole: torch.Tensor) -> torch.Tensor:
        """The weight in use of a sharded parameter that was gathered."""
        if self._written != written(self._source(whole)):
            self._look(whole)
        return whole if self.state is None else self._plain(whole, self.state)

    def take(
        self, state: State | None, raw: torch.Tensor, since: tuple[int, int] | None = None
    ) -> None:
        """Use vectors that were advanced on the parameter as it is, or as it was `since`.

        Another thread may have written to it meanwhile.
        """
        self._own, self.state, self.drifting = raw, state, False
        self._written, self._copied, self._loaded = since or written(raw), None, None
        self._sample = None if state is None else sample(raw)
        # On another device this would need a sync, which is taken while the weight may be zero.
        looks = raw.is_cpu or self._saw_zeros
        self._saw_zeros = looks and self._is_of_zeros(state)

    def _is_as_measured(self, raw: torch.Tensor, state: State | None) -> bool | None:
        """Whether the norms in this state are of the parameter as it is; None if unknown.

        A sample of entries shows some of the writes that torch does not count. Meanwhile another
        thread may have set another state.
        """
        now = None if (then := self._sample) is None else sample(raw)
        return None if now is None or self.state is not state else now == then

    def is_fresh(self, raw: torch.Tensor) -> bool:
        """Whether only steps have written to the parameter since the vectors were found."""
        return self.state is not None and self._own is raw and self._written == written(raw)

    def is_replaced(self, raw: torch.Tensor) -> bool:
        """Whether this is another tensor than the one whose vectors are known."""
        return self._own is not None and self._own is not raw

    def stepped(self, raw: torch.Tensor) -> None:
        """An optimizer's step may have changed the parameter."""
        self._sample = None
        if not self.sharded and (self._saw_zeros or self.is_replaced(raw)):
            # torch may not have counted the write, and compiled code does not check for one.
            if self._written != written(raw) or not self._fits(raw, self.state):
                self.measure(raw)
        elif self._saw_zeros:
            self.forget()  # A sharded weight is measured when it is gathered again.
        elif self.state is not None and not self.forgotten and self._written != written(raw):
            self.drifting, self._written = True, written(raw)

    def has_drifted(self, raw: torch.Tensor) -> bool:
        """Whether the vectors are behind the weight by steps, or by writes that nobody counted.

        False if the parameter was replaced, or written to by anything but its optimizer: its
        vectors are of no use then.
        """
        known = self.state is not None
        fresh = self.is_fresh(raw) or self._loaded == written(raw)
        if known and self._own is not None and not fresh:
            return False
        return self.drifting or (known and not self.sharded and not self._fits(raw, self.state))

    def forget(self) -> None:
        """Measure at the next use, whatever is known now."""
        self._written = _FORGOTTEN

    @property
    def forgotten(self) -> bool:
        """Whether the vectors are known to belong to another weight, or to zeros."""
        return self._saw_zeros or self._written == _FORGOTTEN

    def load(self, state: State | None, raw: torch.Tensor, *, drifting: bool) -> None:
        """Use the vectors of a checkpoint, if they fit the parameter as it is."""
        self.take(state, raw)
        self._saw_zeros = self._is_of_zeros(state)
        self.drifting, self._sample = drifting, None
        if self.sharded:
            # Whether they fit shows in the next forward pass, which gathers the whole weight.
            self._loaded, self._written = None if state is None else self._written, None
        elif state is None:
            # It was saved before the layer had seen an input, or while it was not finite.
            self._written = None
        elif not drifting and not self._fits(raw, state):
            self.forget()
        elif not drifting and self._fits(raw, state, closely=True):
            self._sample = sample(raw)

    def _fits(self, raw: torch.Tensor, state: State | None, *, closely: bool = False) -> bool:
        """Whether the norms along the vectors are still those that were measured."""
        follow = self._follow
        if self.drifting or state is None or follow is None:
            return state is not None
        with torch.no_grad():
            return is_measured(follow, raw.detach(), state, closely=closely)

    def _is_of_zeros(self, state: State | None) -> bool:
        follow = self._follow
        return bool(follow and state and saw_zeros(follow, state))

    def _measured(self, raw: torch.Tensor) -> State | None:
        if self.state is not None and self._follow is None:
            return self.state  # a third-party rule's, which need not depend on the weight
        try:
            with torch.inference_mode(False), torch.no_grad():
                weight = raw.detach()
                if weight.is_inference() or self.sharded or not self._is_own(raw):
                    # A clone, because NumPy's view would keep memory alive that others own.
                    weight = weight.clone()
                state: State = self.rule.init(weight, self.geometry, self.name)
                return state
        except NonFiniteError:
            return None
        except GeometryError as error:
            if self.lenient and is_misfit(error, self.geometry, raw.shape):
                return None
            raise type(error)(f"{self.name}: {error}") from error
