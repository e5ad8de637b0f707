"""The model of the GPU kernels' least times, against figures worked out by hand and against what calls launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import static
from benchmarks.shapes import REGISTRY, Shape, batched
from benchmarks.static import Cost, Machine, total
from efficientvit_kernels.__main__ import main
from tests.processes import python

# 2 images of 64 channels: 2 heads of 32; 8 x 8 = 64 tokens, 128 pixels. 16 bits: 128 * 64 * 2 = 16384 bytes an image.
SMALL = Shape("small", 2, 64, 32, 8, 8)
IMAGE, STATE = 16384, 2 * 2 * 33 * 32 * 4
MACHINE = Machine("", memory=1e3, tensor=1e6, tf32=1e5, fma=1e4, launch=1.0)


@pytest.mark.parametrize(
    ("cost", "seconds"),
    [
        (Cost("", bytes=5000), 5.0),
        (Cost("", bytes=5000, tensor=7e6), 7.0),
        (Cost("", bytes=5000, tensor=3e6, tf32=4e5), 7.0),  # the same unit does both
        (Cost("", bytes=5000, fma=8e4), 8.0),
        (Cost("", bytes=5000, launches=9), 9.0),
    ],
)
def test_the_longest_bound_counts(cost: Cost, seconds: float) -> None:
    assert cost.seconds(MACHINE) == pytest.approx(seconds)
    assert total([cost, cost], MACHINE) == pytest.approx(2 * seconds)


def test_attention_by_hand() -> None:
    """Two scales of one split. Products: 2 * 32 operations for each of 128 * 64 values and scale."""
    kv, apply = static.attention_forward(SMALL, "float16")
    product = 2 * 64 * 128 * 64
    assert (kv.bytes, kv.launches) == (2 * (2 * IMAGE + STATE), 2)
    assert (kv.tensor, kv.tf32, kv.fma) == (product, 0, 2 * 128 * 64)
    assert (apply.bytes, apply.launches) == (2 * (2 * IMAGE + STATE), 2)
    assert (apply.tensor, apply.tf32) == (0, product)
    state, grad_kv = static.attention_backward(SMALL, "float16")
    assert state.bytes == 2 * (3 * IMAGE + 2 * STATE)
    assert grad_kv.bytes == 2 * (4 * IMAGE + STATE)
    assert state.tf32 == grad_kv.tf32 == 3 * product  # three products, of which one is the second part
    exact = static.attention_backward(SMALL, "float32")
    assert [cost.fma for cost in exact] == [2 * product + 2 * 9 * 128 * 64, 2 * product + 2 * 128 * 64]
    assert exact[0].bytes == 2 * (3 * 2 * IMAGE + 2 * STATE)


def test_more_splits_than_a_reader_adds_up() -> None:
    """64 x 64 tokens: 16 splits of 256."""
    shape = Shape("", 1, 64, 32, 64, 64, ())
    kv, summed, apply = static.attention_forward(shape, "float16")
    image, state = 4096 * 64 * 2, 2 * 33 * 32 * 4
    assert kv.bytes == 2 * image + 16 * state
    assert (summed.bytes, summed.launches) == (17 * state, 1)
    assert apply.bytes == 2 * image + 2 * state


def test_aggregation_by_hand() -> None:
    (forward,) = static.aggregation_forward(SMALL, "float16")
    weights = 3 * 64 * (25 + 32)
    assert forward.bytes == 6 * IMAGE + 2 * weights
    assert forward.fma == 2 * 25 * 3 * 64 * 128
    assert forward.tf32 == 2 * 32 * 3 * 64 * 128
    weight_gradients, _, back = static.aggregation_backward(SMALL, "float16")
    assert weight_gradients.bytes == 9 * IMAGE + 6 * weights
    assert (weight_gradients.fma, weight_gradients.tf32) == (2 * forward.fma, 2 * forward.tf32)
    assert (back.bytes, back.fma) == (6 * IMAGE, forward.fma)


def test_block_by_hand() -> None:
    """An image of 8 x 8 is two tiles or more of 4 x 8 or less, which are as many splits."""
    splits = static._Sizes(SMALL, "float16").fused_splits
    assert splits is not None
    assert 2 <= splits <= 4
    qkv, state, apply, proj = static.block(SMALL, "float16")
    assert (qkv.bytes, qkv.tensor) == (4 * IMAGE + 3 * 64 * 64 * 2, 2 * 3 * 64 * 64 * 128)
    assert state.bytes == 2 * IMAGE + 2 * 3 * 64 * 57 * 2 / 3 + 2 * splits * STATE
    assert state.fma == (2 * 2 * 25 + 2) * 64 * 128  # two of q, k and v; z of both scales
    assert (state.tensor, state.tf32) == (2 * 32 * 64 * 128, (2 * 2 * 32 + 2 * 32) * 64 * 128)
    assert apply.bytes == 3 * IMAGE + 2 * 3 * 64 * 57 / 3 + 2 * splits * STATE
    assert apply.tf32 == (2 * 32 + 2 * 2 * 32) * 64 * 128
    assert (proj.bytes, proj.tensor) == (4 * IMAGE + 2 * 64 * 64 * 2 + 8 * 64, 2 * 2 * 64 * 64 * 128)
    assert len(static.block(SMALL, "float32")) == 4 + 3  # scale, shift and residual are kernels of their own


def test_a_block_that_is_not_fused() -> None:
    wide = Shape("", 1, 192, 96, 8, 8)
    names = [cost.kernel for cost in static.block(wide, "float16")]
    assert names == ["product qkv", "aggregation 5 x 5", "kv_state", "apply", "product proj"]


def test_eager_by_hand() -> None:
    """Bytes per pixel and channel, one scale beside the identity, D 32: convolutions 8 + 12 + 12, cat 24, cast 36, relu
    32, pad 24.25, products 32.5, denominator 0.5, division 16.25, cast 12, projection 6, norm 4, residual 6.
    """
    weights = 64 * 64 * 2 * (3 + 2)
    moved = sum(cost.bytes for cost in static.eager(SMALL, "float16"))
    assert moved == pytest.approx(225.5 * 64 * 128 + weights)
    moved = sum(cost.bytes for cost in static.compiled(SMALL, "float16"))
    assert moved == pytest.approx(125 * 64 * 128 + weights)


# Worked out by hand from the kernels of the official module, with the same rates: us of eager and of compile.
OFFICIAL = [
    ("b3-224-stage3", 1, 42.5, 27.5),  # 17 and 11 launches
    ("b1-224-stage3", 64, 88.4, 47.6),
    ("b3-1024x2048-stage3", 1, 113.0, 61.1),
    ("b3-1024x2048-stage3", 8, 881.8, 489.1),
    ("sam_xl0+xl1-1024-stage4", 16, 468.5, 270.9),
    ("dc_ae_f32-512-stage3", 16, 851.5, 536.8),
    ("sana-1024", 16, 602.4, 424.3),
]


@pytest.mark.parametrize(("name", "batch", "eager", "compiled"), OFFICIAL)
def test_peers_of_official_layers(name: str, batch: int, eager: float, compiled: float) -> None:
    shape = batched(name, batch)
    assert 1e6 * total(static.eager(shape, "float16")) == pytest.approx(eager, rel=2e-3)
    assert 1e6 * total(static.compiled(shape, "float16")) == pytest.approx(compiled, rel=2e-3)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "static.json"
    name = "b3-512-stage3"
    assert main(["bench", "static", "--shape", name, "--dtype", "bfloat16", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "none of it is measured" in printed
    assert f"\n{name}, bfloat16\n" in printed
    assert "aggregation 5 x 5 and apply" in printed
    content = json.loads(output.read_text())
    assert len(content["rows"]) == 3 * len(static.SHAPES)
    found = {(row["shape"]["name"], row["dtype"]): row for row in content["rows"]}
    assert {shape.name for shape in REGISTRY} <= {name for name, _ in found}
    assert found["b3-224-stage3", "float16"]["floor_us"]["block, eager"] == 42.5
    assert main(["bench", "static", "--shape", "none"]) == 1
    assert "shape must be one of" in capsys.readouterr().err


LAUNCHES = """
import torch
from benchmarks.shapes import REGISTRY
from benchmarks.static import attention_backward, attention_forward, block
from efficientvit_kernels.triton_kernels import launch, lite_mla
from efficientvit_kernels.triton_kernels import relu_linear_attention as attention

def empty(*dims):
    return torch.empty(dims, dtype=torch.float16, device="meta")

def compare(costs, recorded, shape):
    costs = [cost for cost in costs if cost.kernel not in ("sum of states", "product qkv")]
    found = [entry.kernel.__name__ for entry in recorded]
    assert sum(cost.launches for cost in costs) == len(found), (shape, costs, found)

for shape in REGISTRY[::4]:
    c, dims = shape.channels, (shape.height, shape.width)
    qkv = [empty(shape.batch, 3 * c, *dims) for _ in range(1 + len(shape.scales))]
    with launch.recording("sm_90") as recorded:
        out, state = attention.relu_linear_attention_fwd(qkv, shape.dim, 1e-15)
        attention.relu_linear_attention_bwd(out, qkv, state, shape.dim, 1e-15, range(len(qkv)))
    compare([*attention_forward(shape, "float16"), *attention_backward(shape, "float16")], recorded, shape)
    x, vector = empty(shape.batch, c, *dims), torch.empty(c, device="meta")
    depthwise = [empty(3 * c, 1, k, k) for k in shape.scales]
    pointwise = [empty(3 * c, shape.dim, 1, 1) for _ in shape.scales]
    weights = (empty(3 * c, c, 1, 1), depthwise, pointwise, empty(c, c * len(qkv), 1, 1))
    with launch.recording("sm_90") as recorded:
        lite_mla.lite_mla_fwd(x, *weights, None, [], [], vector, vector, x, shape.dim, 1e-15, False)
    compare(block(shape, "float16"), recorded, shape)
"""


def test_launches_are_those_of_the_ops() -> None:
    done = python("-c", LAUNCHES, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
