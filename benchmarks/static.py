"""What arithmetic alone says of the GPU kernels: bytes moved once, FLOPs by unit, launches, and the least time of each.

`python -m efficientvit_kernels bench static` prints the table and writes `benchmarks/results/static_h200.json`. The
model is a bound, not a forecast: a kernel takes the longest of its bytes over the bandwidth of the memory, its
operations over the rate of the unit that does them, and 2.5 us for each launch in a CUDA graph. Eager's and compile's
kernels are held to the same rule, op by op of the official module.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.report import format_table
from benchmarks.shapes import GPU_FIRST, REGISTRY, Shape
from efficientvit_kernels.triton_kernels.configs import MAX_SUMMED_SPLITS, tokens_per_split
from efficientvit_kernels.triton_kernels.lite_mla_configs import block_config, tiles_per_split

RESULT = Path(__file__).parent / "results" / "static_h200.json"
SHAPES = tuple(dict.fromkeys((*REGISTRY, *GPU_FIRST)))
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Machine:
    """Bytes and operations per second, and seconds per launch in a CUDA graph."""

    name: str
    memory: float
    tensor: float  # matrix products of 16-bit operands
    tf32: float  # of operands in TF32: half the rate
    fma: float  # float32 without matrix units
    launch: float


# An H200, assumed until facts.json says what `make gpu` measured there.
H200 = Machine("NVIDIA H200, assumed", 4.3e12, 790e12, 395e12, 60e12, 2.5e-6)


@dataclass(frozen=True)
class Cost:
    """Of one kernel, all its launches together; a multiplication with its addition counts two operations."""

    kernel: str
    bytes: float
    tensor: float = 0
    tf32: float = 0
    fma: float = 0
    launches: int = 1

    def bounds(self, machine: Machine = H200) -> dict[str, float]:
        """Seconds that each resource takes."""
        return {
            "memory": self.bytes / machine.memory,
            "tensor": self.tensor / machine.tensor + self.tf32 / machine.tf32,
            "fma": self.fma / machine.fma,
            "launch": self.launches * machine.launch,
        }

    def seconds(self, machine: Machine = H200) -> float:
        return max(self.bounds(machine).values())


@dataclass(frozen=True)
class _Sizes:
    """Of a shape in one dtype. Operations of products go to the unit that takes their operands."""

    shape: Shape
    dtype: str

    @property
    def size(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def image(self) -> float:
        """Bytes of C channels."""
        return float(self.shape.pixels * self.shape.channels * self.size)

    @property
    def scales(self) -> int:
        return 1 + len(self.shape.scales)

    @property
    def splits(self) -> int:
        tokens = self.shape.height * self.shape.width
        return -(-tokens // tokens_per_split(tokens))

    @property
    def fused_splits(self) -> int | None:
        """Of the kernels that aggregate and sum in one; None where they do not serve this block."""
        kind, block_d = "ieee" if self.dtype == "float32" else "half", max(16, 1 << (self.shape.dim - 1).bit_length())
        width, splits = self.shape.width, []
        for k in self.shape.scales:
            state, apply = (block_config(kernel, kind, block_d, k, width) for kernel in ("state", "apply"))
            if state is None or apply is None:
                return None
            tiles, _ = state.tiles(self.shape.height, width)
            splits.append(-(-tiles // tiles_per_split(tiles)))
        return max(splits, default=None)

    def states(self, splits: int) -> float:
        """Bytes of the states of one scale in fp32."""
        return 4.0 * self.shape.batch * self.shape.heads * (self.shape.dim + 1) * self.shape.dim * splits

    def products(self, per_channel: float, computed: bool = True) -> dict[str, float]:
        """Of `per_channel` operations for every token and channel; `computed`: an operand is not as it was stored."""
        count = per_channel * self.shape.pixels * self.shape.channels
        return {"fma" if self.dtype == "float32" else "tf32" if computed else "tensor": count}

    def fma(self, per_channel: float) -> float:
        return per_channel * self.shape.pixels * self.shape.channels


def _cost(kernel: str, bytes_: float, *parts: dict[str, float], fma: float = 0, launches: int = 1) -> Cost:
    units = {unit: sum(part.get(unit, 0.0) for part in parts) for unit in ("tensor", "tf32", "fma")}
    return Cost(kernel, bytes_, units["tensor"], units["tf32"], units["fma"] + fma, launches)


def attention_forward(shape: Shape, dtype: str) -> list[Cost]:
    """relu_linear_attention of all scales: v k'^T, and k' summed; then KV q' and z . q'. relu is not counted."""
    s = _Sizes(shape, dtype)
    kv = s.scales * (2 * s.image + s.states(s.splits))
    out = s.scales * (2 * s.image + s.states(_summed(s.splits)) + (s.states(1) if s.splits > 1 else 0))
    return [
        _cost("kv_state", kv, s.products(2 * shape.dim * s.scales, False), fma=s.fma(s.scales), launches=s.scales),
        *_sum_of_states(s, s.splits, s.scales),
        _cost("apply", out, s.products(2 * shape.dim * s.scales), fma=s.fma(3 * s.scales), launches=s.scales),
    ]


def attention_backward(shape: Shape, dtype: str) -> list[Cost]:
    """Per scale. In 16 bits products with a state take it in two parts."""
    s = _Sizes(shape, dtype)
    parts = 1 if dtype == "float32" else 2
    first = s.scales * (3 * s.image + s.states(1) + s.states(s.splits))
    second = s.scales * (4 * s.image + s.states(_summed(s.splits)))
    products = (s.products(2 * shape.dim * (parts + 1) * s.scales),) * 2
    return [
        _cost("grad_state", first, products[0], fma=s.fma(9 * s.scales), launches=s.scales),
        *_sum_of_states(s, s.splits, s.scales, s.scales),
        _cost("grad_kv", second, products[1], fma=s.fma(s.scales), launches=s.scales),
    ]


def _summed(splits: int) -> int:
    """Splits that a reader of the states finds."""
    return splits if splits <= MAX_SUMMED_SPLITS else 1


def _sum_of_states(s: _Sizes, splits: int, scales: int, launches: int = 1) -> list[Cost]:
    """A launch of torch's, where the readers would have too many splits to add up."""
    if splits <= MAX_SUMMED_SPLITS:
        return []
    return [Cost("sum of states", scales * (s.states(splits) + s.states(1)), launches=launches)]


def aggregation_forward(shape: Shape, dtype: str) -> list[Cost]:
    s = _Sizes(shape, dtype)
    return [
        _cost(
            f"aggregation {k} x {k}",
            6 * s.image + _aggregation_weights(shape, k) * s.size,
            s.products(6 * shape.dim),
            fma=s.fma(6 * k * k),
        )
        for k in shape.scales
    ]


def aggregation_backward(shape: Shape, dtype: str) -> list[Cost]:
    """Per scale: P^T grad_out, stored, and in the same kernel the gradients of both weights, which need the depthwise
    convolution again; then the sum of their parts, and the convolution back. The parts of the sums are not counted."""
    s = _Sizes(shape, dtype)
    costs = []
    for k in shape.scales:
        weights = _aggregation_weights(shape, k)
        both = s.products(12 * shape.dim)
        costs += [
            _cost(f"grad_weights {k} x {k}", 9 * s.image + weights * (s.size + 4), both, fma=s.fma(12 * k * k)),
            Cost("sum and rounding of gradients", weights * (4 + s.size), launches=3),
            _cost(f"grad_qkv {k} x {k}", 6 * s.image, fma=s.fma(6 * k * k)),
        ]
    return costs


def _aggregation_weights(shape: Shape, k: int) -> int:
    return 3 * shape.channels * (k * k + shape.dim)


def products(shape: Shape, dtype: str) -> tuple[Cost, list[Cost]]:
    """qkv, and the projection with scale, shift and residual: one kernel in 16 bits, four in float32."""
    s = _Sizes(shape, dtype)
    c = shape.channels
    qkv = _cost("product qkv", 4 * s.image + 3 * c * c * s.size, s.products(6 * c, False))
    proj = _projection(s)
    if dtype == "float32":
        epilogue = [("scale", 2), ("shift", 2), ("residual", 3)]
        return qkv, [proj, *(Cost(name, images * s.image) for name, images in epilogue)]
    return qkv, [replace(proj, bytes=proj.bytes + s.image + 8 * c, fma=proj.fma + s.fma(3))]


def block(shape: Shape, dtype: str) -> list[Cost]:
    """lite_mla in inference. Where aggregation is fused with the state, and with its application, q, k and v of the
    aggregated scales stay on chip."""
    first, last = products(shape, dtype)
    s = _Sizes(shape, dtype)
    splits = s.fused_splits
    if splits is None:
        return [first, *aggregation_forward(shape, dtype), *attention_forward(shape, dtype), *last]
    kv, apply = [], []
    for i, k in enumerate(shape.scales):
        scales = 2 if i == 0 else 1  # the identity comes with the first
        d, weights = shape.dim, _aggregation_weights(shape, k) * s.size
        identity = s.products(2 * d, False) if i == 0 else {}
        kv.append(
            _cost(
                f"aggregation {k} x {k} and state",
                2 * s.image + weights * 2 / 3 + scales * s.states(splits),
                s.products(4 * d + 2 * d),
                identity,
                fma=s.fma(4 * k * k + scales),
            )
        )
        apply.append(
            _cost(
                f"aggregation {k} x {k} and apply",
                (1 + scales) * s.image + weights / 3 + scales * s.states(_summed(splits)),
                s.products(2 * d + 2 * d * scales),
                fma=s.fma(2 * k * k + 3 * scales),
            )
        )
    return [first, *kv, *_sum_of_states(s, splits, s.scales), *apply, *last]


def eager(shape: Shape, dtype: str) -> list[Cost]:
    """The official module in inference: float32 inside its attention for float16, after it for bfloat16."""
    s = _Sizes(shape, dtype)
    a, pad = s.scales * s.image, 1 + 1 / shape.dim  # bytes of q, and the row of ones that v gets
    inside = 4 / s.size if dtype == "float16" else 1.0
    wide = a * inside
    narrow = inside == 1.0 and dtype != "float32"  # the division is in fp32 for all dtypes
    exact = a * 4 / s.size
    costs = _convolutions(s)
    costs += [Cost("cat", 2 * 3 * a)] if shape.scales else []
    costs += [Cost("float", 3 * (a + wide))] if inside != 1.0 else []
    costs += [Cost("relu q", 2 * wide), Cost("relu k", 2 * wide)]
    costs += [Cost("pad: fill", pad * wide), Cost("pad: copy", 2 * wide)]
    costs += _batched_products(s, wide, pad, exact_products=dtype != "bfloat16")
    costs += [Cost("out float", pad * (a + exact))] if narrow else []
    costs += [Cost("den + eps", 2 * exact / shape.dim), Cost("divide", (2 + 1 / shape.dim) * exact)]
    costs += [Cost("cast", exact + a)] if dtype != "float32" else []
    return [*costs, _projection(s), Cost("norm", 2 * s.image), Cost("residual", 3 * s.image)]


def compiled(shape: Shape, dtype: str) -> list[Cost]:
    """As torch.compile fuses it: convolutions and products as they are, what lies between them in one kernel each."""
    s = _Sizes(shape, dtype)
    a, pad = s.scales * s.image, 1 + 1 / shape.dim
    wide = a * (4 / s.size if dtype == "float16" else 1.0)
    between = [Cost(f"cat, relu, cast: {name}", a + wide * (pad if name == "v" else 1)) for name in "qkv"]
    tail = [Cost("divide, cast", pad * wide + a), _projection(s), Cost("norm, residual", 3 * s.image)]
    return [*_convolutions(s), *between, *_batched_products(s, wide, pad, dtype != "bfloat16"), *tail]


def _convolutions(s: _Sizes) -> list[Cost]:
    costs = [products(s.shape, s.dtype)[0]]
    for k in s.shape.scales:
        costs.append(_cost(f"depthwise {k} x {k}", 6 * s.image, fma=s.fma(6 * k * k)))
        costs.append(_cost("grouped 1 x 1", 6 * s.image, s.products(6 * s.shape.dim, False)))
    return costs


def _batched_products(s: _Sizes, wide: float, pad: float, exact_products: bool) -> list[Cost]:
    """fp32 operands, float16's among them, go without matrix units: TF32 is off in torch."""
    operations = 2 * (s.shape.dim + 1) * s.scales * s.shape.pixels * s.shape.channels
    unit = {"fma": float(operations)} if exact_products else {"tensor": float(operations)}
    return [_cost(f"bmm {name}", (1 + pad) * wide, unit) for name in ("v k", "out")]


def _projection(s: _Sizes) -> Cost:
    c = s.shape.channels
    return _cost(
        "product proj", (s.scales + 1) * s.image + s.scales * c * c * s.size, s.products(2 * c * s.scales, False)
    )


PARTS = {
    "attention forward": attention_forward,
    "attention backward": attention_backward,
    "aggregation forward": aggregation_forward,
    "aggregation backward": aggregation_backward,
    "block": block,
    "block, eager": eager,
    "block, compile": compiled,
}


def total(costs: Iterable[Cost], machine: Machine = H200) -> float:
    """Seconds of kernels that run one after another."""
    return sum(cost.seconds(machine) for cost in costs)


def row(shape: Shape, dtype: str) -> dict[str, Any]:
    parts = {name: part(shape, dtype) for name, part in PARTS.items()}
    return {
        "shape": asdict(shape),
        "dtype": dtype,
        "floor_us": {name: 1e6 * total(costs) for name, costs in parts.items()},
        "launches": {name: sum(cost.launches for cost in costs) for name, costs in parts.items()},
        "kernels": {name: [_kernel(cost) for cost in costs] for name, costs in parts.items()},
    }


def _kernel(cost: Cost) -> dict[str, Any]:
    bounds = cost.bounds()
    return asdict(cost) | {"floor_us": 1e6 * cost.seconds(), "bound": max(bounds, key=lambda name: bounds[name])}


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """One row a line; of eager's and compile's kernels the sums alone."""
    columns = list(rows[0]["kernels"]["block"][0])
    lines = []
    for entry in rows:
        ours = {name: kernels for name, kernels in entry["kernels"].items() if "," not in name}
        lists = {name: [list(kernel.values()) for kernel in kernels] for name, kernels in ours.items() if kernels}
        lines.append(json.dumps(_rounded(entry | {"kernels": lists})))
    head = {"machine": asdict(H200), "kernel_columns": columns}
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n' + ",\n".join(lines) + "\n]}\n")


def run_static(arguments: argparse.Namespace) -> int:
    """All official shapes in three dtypes; `--shape` adds every kernel of those to the table, in `--dtype`."""
    names = [shape.name for shape in SHAPES]
    for name in arguments.shape or ():
        if name not in names:
            raise ValueError(f"bench: shape must be one of {', '.join(sorted(names))}, got {name!r}")
    rows = [row(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    print(f"{H200.name}: least times in us, every kernel at its own bound; none of it is measured")
    print("\n".join(format_table(_summary(rows), arguments.markdown)))
    for entry in rows:
        if entry["shape"]["name"] in (arguments.shape or ()) and entry["dtype"] == arguments.dtype:
            print(f"\n{entry['shape']['name']}, {entry['dtype']}")
            print("\n".join(format_table(_details(entry), arguments.markdown)))
    output = Path(arguments.output) if arguments.output else RESULT
    write(rows, output)
    print(f"\nwritten: {output}")
    return 0


def _summary(rows: list[dict[str, Any]]) -> list[list[str]]:
    lines = [["layer", "dtype", "ours", "launches", "eager", "over eager", "compile", "over compile"]]
    for entry in rows:
        floor, launches = entry["floor_us"], entry["launches"]
        ours, eager_us, compile_us = (floor[name] for name in ("block", "block, eager", "block, compile"))
        name, counts = entry["shape"]["name"], f"{launches['block']} / {launches['block, eager']}"
        times = (f"{ours:.1f}", counts, f"{eager_us:.1f}", f"{eager_us / ours:.1f}x")
        lines.append([name, entry["dtype"], *times, f"{compile_us:.1f}", f"{compile_us / ours:.1f}x"])
    return lines


def _details(entry: dict[str, Any]) -> list[list[str]]:
    lines = [["part", "kernel", "launches", "MB", "GFLOP tensor", "TF32", "fp32", "floor us", "bound"]]
    for part, kernels in entry["kernels"].items():
        for kernel in kernels:
            numbers = [f"{1e-6 * kernel['bytes']:.2f}"]
            numbers += [f"{1e-9 * kernel[unit]:.3f}" for unit in ("tensor", "tf32", "fma")]
            numbers += [f"{kernel['floor_us']:.2f}"]
            lines.append([part, kernel["kernel"], str(kernel["launches"]), *numbers, kernel["bound"]])
    return lines


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return round(value) if value >= 1e5 else round(value, 2)
    return value
