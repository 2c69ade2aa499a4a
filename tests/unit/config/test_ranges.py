"""Every number of a configuration, a cluster profile or a recipe has a range that holds at its edges and not beyond."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bd3_megatron.config.load import build, config_from_tree, load_config, to_tree
from bd3_megatron.config.ranges import SMALLEST_FP32, Range
from bd3_megatron.config.schema import Config
from bd3_megatron.data.recipe import Recipe, SourceSpec
from bd3_megatron.errors import ConfigError
from launch.cluster import ClusterProfile

NUMBERS = (int, float)
Wrap = Callable[[Any], Any]
"""Puts a number where a field's value holds one."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One number of one field."""

    owner: type
    field: str
    place: str
    """Where in the field's value: empty, "[0]", "[]" or "{}"."""
    kind: type
    legal: Range | None
    wrap: Wrap

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.field}{self.place}"

    def built_with(self, number: float) -> Any:
        """The dataclass with this number, everything else at its default."""
        required = [f for f in dataclasses.fields(self.owner) if f.default is f.default_factory is dataclasses.MISSING]
        hints = typing.get_type_hints(self.owner)
        fillers = {str: "x", int: 2, dict[str, float]: {"a": 1.0}, dict[str, SourceSpec]: {}}
        tree = {f.name: fillers[hints[f.name]] for f in required}
        value = self.kind(number) if float(number).is_integer() else number
        return build(self.owner, {**tree, self.field: self.wrap(value)}, where="here")


def dataclasses_of(cls: type) -> Iterator[type]:
    """A dataclass and every one inside it."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from dataclasses_of(typing.cast(type, inner))


def leaves_of(owner: type) -> Iterator[Leaf]:
    for name, hint in typing.get_type_hints(owner, include_extras=True).items():
        for place, kind, legal, wrap in numbers_in(hint):
            yield Leaf(owner, name, place, kind, legal, wrap)


def numbers_in(hint: Any) -> Iterator[tuple[str, type, Range | None, Wrap]]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        declared = next((law for law in args[1:] if isinstance(law, Range)), None)
        for place, kind, legal, wrap in numbers_in(args[0]):
            yield place, kind, legal or declared, wrap
    elif origin in (types.UnionType, typing.Union):
        found = [leaf for arg in args for leaf in numbers_in(arg)]
        # of `int | float` the wider one
        yield from found[-1:]
    elif origin is tuple:
        size = 1 if args[-1] is Ellipsis else len(args)
        for position in range(size):
            for _, kind, legal, _ in numbers_in(args[position]):
                fill = legal.upper if legal is not None and not legal.open_upper else legal.lower if legal else 1
                place = "[]" if args[-1] is Ellipsis else f"[{position}]"
                yield place, kind, legal, lambda v, p=position, f=fill: [v if i == p else f for i in range(size)]
    elif origin is dict:
        for _, kind, legal, _ in numbers_in(args[1]):
            yield "{}", kind, legal, lambda v: {"key": v}
    elif hint in NUMBERS:
        yield "", hint, None, lambda v: v


CLASSES = list(dict.fromkeys(cls for top in (Config, ClusterProfile, Recipe) for cls in dataclasses_of(top)))
LEAVES = [leaf for cls in CLASSES for leaf in leaves_of(cls)]


def beside(edge: float, kind: type, *, up: bool, even: bool) -> float:
    """The nearest number of that kind on one side."""
    if kind is int:
        step = 2 if even else 1
        return edge + step if up else edge - step
    return math.nextafter(edge, math.inf if up else -math.inf)


def beside_in_fp32(edge: float, kind: type, *, up: bool) -> float:
    """The nearest number of that kind that fp32 tells apart."""
    if kind is int:
        return edge + 1 if up else edge - 1
    return float(np.nextafter(np.float32(edge), np.float32(math.inf if up else -math.inf)))


def test_there_are_many_numbers() -> None:
    assert len(LEAVES) > 80 and len({str(leaf) for leaf in LEAVES}) == len(LEAVES)


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_every_number_has_a_range_that_holds_at_its_edges_and_not_beyond(leaf: Leaf) -> None:
    legal = leaf.legal
    assert legal is not None, f"{leaf} has no range; write Annotated[{leaf.kind.__name__}, Range(lowest, highest)]"
    for edge, is_open, up in ((legal.lower, legal.open_lower, False), (legal.upper, legal.open_upper, True)):
        # a run computes in fp32, so the nearest number of an open end is fp32's
        inside = beside_in_fp32(edge, leaf.kind, up=not up) if is_open else edge
        outside = edge if is_open else beside(edge, leaf.kind, up=up, even=legal.even)
        leaf.built_with(inside)
        if legal.or_zero and outside == 0:
            continue
        with pytest.raises(ConfigError, match=rf"^here\.{leaf.field}.*(is outside|is not finite)"):
            leaf.built_with(outside)


COMPUTED = [leaf for leaf in LEAVES if leaf.kind is float and leaf.legal is not None and leaf.legal.lower >= 0]


@pytest.mark.parametrize("leaf", COMPUTED, ids=str)
def test_a_number_that_fp32_cannot_tell_from_the_end_of_its_range_is_refused(leaf: Leaf) -> None:
    legal = leaf.legal
    assert legal is not None
    assert not (legal.lower == 0 and legal.open_lower), (
        f"{leaf}: fp32's least number is no meant one; give a least value"
    )
    lost = [math.nextafter(legal.lower, math.inf)] * legal.open_lower
    lost += [math.nextafter(legal.upper, -math.inf)] * legal.open_upper
    # 0 itself may switch something off; what fp32 reads as 0 would do so without a word
    lost += [1e-300, math.nextafter(SMALLEST_FP32, 0)]
    for number in lost:
        with pytest.raises(ConfigError, match=rf"^here\.{leaf.field}.*(is outside|is 0 in fp32; give 0 or)"):
            leaf.built_with(number)
    if legal.lower == 0:
        leaf.built_with(SMALLEST_FP32)


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf.legal and leaf.legal.or_zero], ids=str)
def test_zero_switches_off_where_the_range_says_so(leaf: Leaf) -> None:
    leaf.built_with(0)


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf.legal and leaf.legal.even], ids=str)
def test_odd_numbers_are_refused_where_the_range_says_so(leaf: Leaf) -> None:
    assert leaf.legal is not None
    with pytest.raises(ConfigError, match="give an even number"):
        leaf.built_with(leaf.legal.lower + 1)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_default_is_inside_its_range(cls: type) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    for leaf in leaves_of(cls):
        default = defaults.get(leaf.field)
        if default is not None:
            values = default if isinstance(default, tuple) else (default,)
            assert leaf.legal is not None and all(map(leaf.legal.holds, values)), str(leaf)


MINIMAL = """
run: {dir: runs/x}
model: {num_layers: 2, hidden_size: 64, num_heads: 4}
data: {seq_len: 64}
train: {steps: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "optim.min_lr_ratio=-1",
            r"^optim\.min_lr_ratio=-1\.0 is outside \[0, 1\]; give a number of at least 0 and at most 1\.$",
        ),
        (
            "model.ffn_hidden_size=0",
            r"^model\.ffn_hidden_size=0 is outside \[1, 1e7\]; give a whole number of at least 1 and",
        ),
        (
            "model.head_dim=15",
            r"^model\.head_dim=15 is outside \[2, 10000\], even; give an even number of at least 2 and at most",
        ),
        (
            "optim.ema_decay=1.5",
            r"^optim\.ema_decay=1\.5 is outside \[0, 1\); give a number of at least 0 and below 1\.$",
        ),
        ("optim.betas=[0.9, 1.5]", r"^optim\.betas\[1\]=1\.5 is outside \[0, 1\)"),
        ("diffusion.search_widths=[0.5, 2]", r"^diffusion\.search_widths\[1\]=2\.0 is outside \[0\.01, 1\)"),
        ("diffusion.interval=[0.0001, 1.0]", r"^diffusion\.interval\[0\]=0\.0001 is outside \[0\.001, 1\]"),
        ("evaluate.num_sequences=0", r"^evaluate\.num_sequences=0 is outside \[1, 1e9\]"),
        ("optim.adam_eps=-1e-8", r"^optim\.adam_eps=-1e-08 is outside \[1e-30, 1\]"),
        (
            "optim.lr=1e300",
            r"^optim\.lr=1e\+300 is outside \[1e-12, 1000\]; give a number of at least 1e-12 and at most",
        ),
        ("optim.lr=1e-300", r"^optim\.lr=1e-300 is outside \[1e-12, 1000\]"),
        ("model.init_std=1e-300", r"^model\.init_std=1e-300 is outside \[1e-8, 1\]"),
        ("optim.clip_grad_norm=1e-300", r"^optim\.clip_grad_norm=1e-300 is outside 0 or \[1e-8, 1e9\]"),
        ("watch.hang_seconds=1e-9", r"^watch\.hang_seconds=1e-09 is outside \[0\.1, 1e7\]"),
        (
            "model.dropout=.99999999",
            r"^model\.dropout=0\.99999999 is 1 in fp32, which is outside \[0, 1\); give a number of at least 0 and below 1\.$",
        ),
        (
            "optim.weight_decay=1e-300",
            r"^optim\.weight_decay=1e-300 is 0 in fp32; give 0 or a number of at least 1\.18e-38 in \[0, 1000\]\.$",
        ),
        (
            "watch.hang_factor=0.5",
            r"^watch\.hang_factor=0\.5 is outside 0 or \[1, 1e6\]; give 0 or a number of at least 1 and",
        ),
        ("run.dir=''", r"^run\.dir='' is empty; give a path, or leave the key out\.$"),
        (
            "data.path=~/data",
            r"^data\.path='~/data' begins with ~, which only a shell replaces; write the whole path \(\$HOME/.* in a shell\)\.$",
        ),
        ("data.text=[a, ~root/b]", r"^data\.text\[1\]='~root/b' begins with ~"),
        ("data.mixture={~/a: 1}", r"^data\.mixture='~/a' begins with ~"),
        ('run.dir="a\\nb"', r"^run\.dir='a\\nb' holds a control character, such as a line break; remove it\.$"),
        (
            f"run.dir={'x' * 300}",
            r"^run\.dir='x+\.\.\.x+' is too long for a file system: 4000 bytes, 255 between two slashes;",
        ),
        (f"run.dir={'x/' * 2100}", r"is too long for a file system"),
        ("data.mixture={a: -1}", r"^data\.mixture\.a=-1\.0 is outside \[0, 1e9\]"),
        ("data.stages=[{mixture: {a: 1}, steps: 0}]", r"^data\.stages\[0\]\.steps=0 is outside \[1, 1e9\]"),
        ("parallel.layers_per_stage=[0, 4]", r"^parallel\.layers_per_stage\[0\]=0 is outside \[1, 10000\]"),
        (
            "data.stream={dataset: a, filters: [{column: c, equals: 1.0e+20}]}",
            r"filters\[0\]\.equals=1e\+20 is outside",
        ),
    ],
)
def test_a_number_outside_its_range_is_refused_by_its_name(file: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(file, [override])


def test_a_stored_configuration_obeys_the_same_ranges(file: Path) -> None:
    tree = to_tree(load_config(file))
    tree["optim"]["min_lr_ratio"] = -1.0
    with pytest.raises(ConfigError, match=r"^optim\.min_lr_ratio=-1\.0 is outside \[0, 1\]"):
        config_from_tree(tree)
