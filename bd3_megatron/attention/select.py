"""Which attention backend serves a request, and why the others do not. The only place that knows them all by name.

Decides: on CPU `auto` is structured (exact, no mask, the only fast one with a backward there). On CUDA every contestant
that does not refuse is first held against the judge on a small problem of the same kind, gradients included, and then timed
on the request itself; the fastest wins. A backend that was asked for by name and cannot serve is an error with its reason,
never a silent replacement.
Refuses nothing itself. Costs nothing on CPU; on CUDA some compilations and a few dozen calls at start-up, once.
Timing is a property of one process: where several ranks must run the same kernels, one rank chooses and the others are
given its `label`. flash-attn and TransformerEngine are detected (`optional_packages`), never required.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

import torch

from bd3_megatron.attention import dense, flex, structured
from bd3_megatron.attention.probe import error_against_judge, measure_seconds
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.streams import Attend
from bd3_megatron.errors import BackendError, either

Refuse = Callable[[AttentionRequest], str | None]
Measure = Callable[[Attend, AttentionRequest], float]
Judge = Callable[[Attend, AttentionRequest], float]


@dataclass(frozen=True)
class Backend:
    """A chosen backend, ready to be called."""

    label: str
    """Name, or name/variant; `choose` takes either."""
    attend: Attend
    why: str
    """One line for the log."""


@dataclass(frozen=True)
class _Contestant:
    label: str
    attend: Attend
    refuse: Refuse

    @property
    def name(self) -> str:
        return self.label.partition("/")[0]


def accept_all(request: AttentionRequest) -> str | None:
    """The judge serves everything, slowly."""
    return None


def _structured_with(kernel: str) -> _Contestant:
    def refuse(request: AttentionRequest) -> str | None:
        reason = structured.refuse(request)
        if reason is None and kernel not in structured.kernels(request):
            reason = f"structured attention has no kernel {kernel!r} for {request.device_type} {request.dtype}."
        return reason

    return _Contestant(f"structured/{kernel}", functools.partial(structured.attend, kernel=kernel), refuse)


_CONTESTANTS = (
    _Contestant("dense", dense.attend, accept_all),
    _structured_with("cpu"),
    _structured_with("cudnn"),
    _structured_with("flash"),
    _structured_with("efficient"),
    _Contestant("flex/TRITON", functools.partial(flex.attend, kernel="TRITON"), flex.refuse),
    _Contestant("flex/FLASH", functools.partial(flex.attend, kernel="FLASH"), flex.refuse_flash),
)

BACKENDS: MappingProxyType[str, tuple[Attend, Refuse]] = MappingProxyType(
    {
        "dense": (dense.attend, accept_all),
        "structured": (structured.attend, structured.refuse),
        "flex": (flex.attend, flex.refuse),
    }
)


def choose(
    name: str, request: AttentionRequest, *, measure: Measure = measure_seconds, judge: Judge = error_against_judge
) -> Backend:
    """Pick the backend for a request.

    Args:
        name: "auto", a name in `BACKENDS`, or a label that an earlier choice returned ("structured/cudnn").
        request: what a layer will ask.
        measure: seconds of one forward (and backward) of a backend on the request.
        judge: error of a backend against dense, in units of its tolerance (above 1 is wrong).

    Returns:
        The backend.

    Raises:
        BackendError: if the name is unknown, or the backend asked for cannot serve; the message says why.
    """
    entrants = [c for c in _CONTESTANTS if name in (c.label, c.name) or (name == "auto" and c.name != "dense")]
    if not entrants:
        raise BackendError(f"attention backend {name!r} does not exist; use {either(['auto', *BACKENDS])}.")
    refusals = {c.label: reason for c in entrants if (reason := c.refuse(request)) is not None}
    able = [c for c in entrants if c.label not in refusals]
    if name in BACKENDS and not able and (reason := BACKENDS[name][1](request)) is not None:
        refusals = {name: reason}
    if request.device_type == "cuda":
        able, wrong = _correct(able, request, judge)
        refusals |= wrong
    if able:
        return _fastest(able, request, measure)
    if name == "auto":
        return Backend("dense", dense.attend, f"every fast backend refuses: {_reasons(refusals)}")
    raise BackendError(_reasons(refusals))


def backends(request: AttentionRequest) -> list[tuple[str, Attend, str | None]]:
    """Every contestant as (label, attend, why it refuses the request or None), the judge first."""
    return [(c.label, c.attend, c.refuse(request)) for c in _CONTESTANTS]


def optional_packages() -> dict[str, str | None]:
    """Versions of the packages that some kernels come from; None where one is not installed."""
    return {name: _version(name) for name in ("triton", "flash-attn", "flash-attn-4", "transformer-engine")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _correct(
    able: list[_Contestant], request: AttentionRequest, judge: Judge
) -> tuple[list[_Contestant], dict[str, str]]:
    """Those that agree with the judge, and what is wrong with the others."""
    wrong: dict[str, str] = {}
    for contestant in able:
        try:
            error = judge(contestant.attend, request)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as failure:
            wrong[contestant.label] = f"{contestant.label} fails on this machine: {_first_line(failure)}"
            continue
        if not error <= 1:
            wrong[contestant.label] = (
                f"{contestant.label} differs from the dense judge by {error:.3g} times its tolerance on this machine."
            )
    return [c for c in able if c.label not in wrong], wrong


def _fastest(able: list[_Contestant], request: AttentionRequest, measure: Measure) -> Backend:
    if len(able) == 1 or request.device_type != "cuda":
        return Backend(able[0].label, able[0].attend, "the first that serves this request")
    seconds = {c.label: measure(c.attend, request) for c in able}
    best = min(able, key=lambda c: seconds[c.label])
    table = ", ".join(f"{label} {1e3 * s:.3g} ms" for label, s in sorted(seconds.items(), key=lambda item: item[1]))
    return Backend(best.label, best.attend, f"fastest at start-up: {table}")


def _reasons(refusals: dict[str, str]) -> str:
    return " ".join(dict.fromkeys(refusals.values()))


def _first_line(failure: Exception) -> str:
    return (str(failure).splitlines() or [type(failure).__name__])[0]
