"""Which attention backend serves a request, and why the others do not. No other module knows them all by name.

On CPU `auto` is one masked call for short sequences, else structured (exact, no mask, the only fast one with a backward
there). On CUDA every candidate that does not refuse is first held against the reference on the request's own rows, gradients
included, and then timed there; the fastest wins. A backend that was asked for by name and cannot serve is an error with its
reason, never a silent replacement. Timing is a property of one process: where several ranks must run the same kernels, one
chooses and the others take its `label`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch

from bd3_megatron.attention import dense, flex, plain, sdpa, structured, triton_pair
from bd3_megatron.attention.probe import error_against_reference, measure_seconds
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.streams import Attend, AttendRows
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.errors import BackendError, either

Refuse = Callable[[AttentionRequest], str | None]
Measure = Callable[[Attend, AttentionRequest], float]
Compare = Measure
Prepare = Callable[[Visibility, torch.device], object]


def _no_tables(visibility: Visibility, device: torch.device) -> None:
    """This backend reads the visibility itself."""


@dataclass(frozen=True)
class Backend:
    """A chosen backend, ready to be called."""

    label: str
    """Name, or name/variant; `choose` takes either."""
    attend: Attend
    why: str
    """One line for the log."""
    prepare: Prepare = _no_tables
    """Makes the tables of a visibility on a device, so that they travel with the batch and no layer waits for them."""
    attend_rows: AttendRows | None = None
    """The same attention of rows that are not cut into streams, where the backend would only join them again."""


@dataclass(frozen=True)
class _Candidate:
    label: str
    attend: Attend
    refuse: Refuse
    prepare: Prepare = _no_tables
    attend_rows: AttendRows | None = None

    @property
    def name(self) -> str:
        return self.label.partition("/")[0]

    def chosen(self, why: str) -> Backend:
        return Backend(self.label, self.attend, why, self.prepare, self.attend_rows)


def accept_all(request: AttentionRequest) -> str | None:
    """The reference serves everything, slowly."""
    return None


def _structured_with(kernel: str) -> _Candidate:
    def refuse(request: AttentionRequest) -> str | None:
        reason = structured.refuse(request)
        if reason is None and kernel not in structured.kernels(request):
            reason = f"structured attention has no kernel {kernel!r} for {request.device_type} {request.dtype}."
        return reason

    return _Candidate(f"structured/{kernel}", functools.partial(structured.attend, kernel=kernel), refuse)


def _flex_with(kernel: flex.KernelName, refuse: Refuse) -> _Candidate:
    rows = functools.partial(flex.flex_rows, kernel=kernel)
    return _Candidate(f"flex/{kernel}", functools.partial(flex.attend, kernel=kernel), refuse, flex.block_mask, rows)


# In order of preference where nothing is timed (CPU): the first that serves is taken. `auto` leaves dense out.
_CANDIDATES = (
    _Candidate("dense", dense.attend, accept_all),
    _Candidate("dense/sdpa", sdpa.attend, sdpa.refuse, attend_rows=sdpa.masked_rows),
    _structured_with("cpu"),
    _structured_with("cudnn"),
    _structured_with("flash"),
    _structured_with("efficient"),
    _Candidate("plain", plain.attend, plain.refuse),
    _flex_with("TRITON", flex.refuse),
    _flex_with("FLASH", flex.refuse_flash),
    _Candidate("triton", triton_pair.attend, triton_pair.refuse, triton_pair.tables),
)

_REFUSALS: MappingProxyType[str, Refuse] = MappingProxyType(
    {"dense": accept_all, "structured": structured.refuse, "flex": flex.refuse, "triton": triton_pair.refuse}
)
"""What a user may ask for by name; structured/* and flex/* have reasons in common."""


def named(name: str) -> Backend:
    """The first backend of a name, or the one of a label, as it is: somebody else has chosen it.

    Raises:
        BackendError: there is none.
    """
    return _entrants(name)[0].chosen(f"named {name}")


def choose(
    name: str,
    request: AttentionRequest,
    *,
    measure: Measure = measure_seconds,
    compare: Compare = error_against_reference,
) -> Backend:
    """Pick the backend for a request.

    Args:
        name: "auto", what a configuration may name, or a label that an earlier choice returned ("structured/cudnn").
        request: what a layer will ask.
        measure: seconds of one forward (and backward) of a backend on the request.
        compare: error of a backend against dense, in units of its tolerance (above 1 is wrong).

    Returns:
        The backend.

    Raises:
        BackendError: if the name is unknown, or the backend asked for cannot serve; the message says why.
    """
    entrants = _entrants(name)
    refusals = {c.label: reason for c in entrants if (reason := c.refuse(request)) is not None}
    able = [c for c in entrants if c.label not in refusals]
    # a reason that all variants of a name share is given once
    if name in _REFUSALS and not able and (reason := _REFUSALS[name](request)) is not None:
        refusals = {name: reason}
    # no timing on CPU: the order of the candidates already says what is fastest there
    if able and request.device_type != "cuda":
        return able[0].chosen("the first that serves this request")
    errors, wrong = _try_each(able, request, compare)
    for label, error in errors.items():
        # Not "error > 1": NaN is wrong too.
        if not error <= 1:
            wrong[label] = (
                f"{label} differs from the dense reference by {error:.3g} times its tolerance on this machine."
            )
    # only what agrees is timed: a wrong kernel may well be the fastest
    right = [c for c in able if c.label not in wrong]
    seconds, slow = _try_each(right, request, measure)
    refusals |= wrong | slow
    if seconds:
        return _fastest(right, seconds)
    # auto may go on slowly; a backend asked for by name is never replaced in silence
    if name == "auto":
        return Backend("dense", dense.attend, f"every fast backend refuses: {_reasons(refusals)}")
    raise BackendError(_reasons(refusals))


def backends(request: AttentionRequest) -> list[tuple[str, Attend, str | None]]:
    """Every candidate as (label, attend, why it refuses the request or None), the reference first."""
    return [(c.label, c.attend, c.refuse(request)) for c in _CANDIDATES]


def _entrants(name: str) -> list[_Candidate]:
    found = [c for c in _CANDIDATES if name in (c.label, c.name) or (name == "auto" and c.label != "dense")]
    if not found:
        raise BackendError(f"attention backend {name!r} does not exist; use {either(['auto', *_REFUSALS])}.")
    return found


def _try_each(
    candidates: list[_Candidate], request: AttentionRequest, probe: Measure
) -> tuple[dict[str, float], dict[str, str]]:
    """What the probe says of each, and of which it says nothing because the kernel failed."""
    results: dict[str, float] = {}
    failures: dict[str, str] = {}
    for candidate in candidates:
        try:
            results[candidate.label] = probe(candidate.attend, request)
        except Exception as failure:
            # Compilers and kernels fail in types of their own (Triton's have no common parent with torch's): whatever it
            # is, this candidate cannot serve here, and the others still may.
            first_line = (str(failure).splitlines() or [type(failure).__name__])[0]
            failures[candidate.label] = f"{candidate.label} fails on this machine: {first_line}"
    return results, failures


def _fastest(candidates: list[_Candidate], seconds: dict[str, float]) -> Backend:
    ranking = sorted((s, label) for label, s in seconds.items())
    best = next(c for c in candidates if c.label == ranking[0][1])
    table = ", ".join(f"{label} {1e3 * s:.3g} ms" for s, label in ranking)
    return best.chosen(f"fastest at start-up: {table}")


def _reasons(refusals: dict[str, str]) -> str:
    return " ".join(dict.fromkeys(refusals.values()))
