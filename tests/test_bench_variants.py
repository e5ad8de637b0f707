"""The model of lite_mla's variants: what it counts, and that the launch plan follows it."""

from __future__ import annotations

import json
from math import inf

import pytest

from benchmarks import variants
from benchmarks.shapes import Shape
from benchmarks.variants import Block, Rates, Tile, seconds

RATES = Rates(multiprocessors=10, memory=1e12, tensor=1e9, tf32=1e9, fma=1e9, l2=1e9, launch=2e-6, ramp=0.0, shared=100)


def test_time_of_a_launch() -> None:
    """Parts of a block add up, blocks that share a multiprocessor overlap, those beyond it wait."""
    block = Block(load=1e3, tensor=2e3, tf32=1e3, fma=3e3, shared=50)  # 1, 3 and 3 us
    assert seconds(10, block, 0, RATES) == pytest.approx(7e-6)
    assert seconds(20, block, 0, RATES) == pytest.approx(7e-6)  # two of them in 50 bytes each
    assert seconds(30, block, 0, RATES) == pytest.approx(14e-6)
    assert seconds(100, block, 0, RATES) == pytest.approx(35e-6)
    assert seconds(100, Block(0, 0, 0, 3e3, 10), 0, RATES) == pytest.approx(30e-6)  # one unit alone: no overlap
    assert seconds(1, Block(0, 0, 0, 0, 10), 0, RATES) == 2e-6
    assert seconds(1, block, 20e6, RATES) == 20e-6
    assert seconds(1, Block(0, 0, 0, 0, 101), 0, RATES) == inf


def test_halo_within_the_image() -> None:
    """14 x 14 in tiles of 8 x 8, 5 x 5 taps: 10 and 8 rows, and as many columns."""
    tile = Tile(Shape("", 1, 64, 16, 14, 14), 8, 8)
    assert (tile.count, tile.pixels, tile.padded) == (4, 64, 12 * 24)
    assert tile.loaded == 8 * 11  # 9 x 9, by eights
    assert Tile(Shape("", 1, 64, 16, 7, 7), 8, 8).loaded == 56


def test_more_launches_take_no_less_than_their_cost() -> None:
    for shape in variants.layers():
        for variant in variants.VARIANTS.values():
            times = variant(shape, Rates())
            assert all(time >= Rates().launch for time in times)


def test_the_launch_plan_follows_the_model() -> None:
    native = pytest.importorskip("efficientvit_kernels._C", reason="the introspection module was not built")
    rates, preferred = Rates(), 0
    for shape in variants.layers():
        image = (shape.heads, shape.height, shape.width, shape.dim, shape.scales[0])
        plan = native.cuda_two_launches_plan(shape.batch, shape.channels, *image, shape.channels, rates.shared)
        times = {name: sum(variant(shape, rates)) for name, variant in variants.VARIANTS.items()}
        assert plan["preferred"] == (times["two"] < times["four"]), shape
        preferred += plan["preferred"]
        assert times["one"] > 0.7 * min(times["two"], times["four"]), "worth building"
    assert preferred >= 8


def test_what_is_stored_is_what_the_model_says() -> None:
    stored = json.loads(variants.RESULT.read_text())
    assert stored["rates"] == vars(Rates())
    assert stored["rows"] == variants.rows()
