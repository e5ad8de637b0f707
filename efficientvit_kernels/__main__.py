"""Command line: python -m efficientvit_kernels info | verify | demo | bench, and the tasks on images."""

from __future__ import annotations

import argparse
import json
import sys

from ._bench import add_options, run_bench
from .tasks import options as tasks

COMMANDS = ("info", "verify", "demo", "bench", *tasks.COMMANDS)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        "python -m efficientvit_kernels", description="Fused kernels for EfficientViT's LiteMLA."
    )
    commands = root.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))

    info = commands.add_parser("info", help="versions, devices, which backend serves which op, and why not the others")
    info.add_argument("--json", action="store_true", help="the same as JSON")
    info.add_argument("--plan", metavar="BxCxHxW", help="what the CUDA kernels launch for a LiteMLA of this input")
    info.add_argument("--head-dim", type=int, default=16, help="of --plan; default %(default)s")
    info.add_argument("--kernel-size", type=int, default=5, help="of --plan; default %(default)s")
    info.add_argument("--fp32", action="store_true", help="of --plan: float32 storage instead of 16 bits")

    verify = commands.add_parser("verify", help="a model against its float64 reference, layer by layer")
    verify.add_argument("model", help="name of a timm model, or module:callable that returns a torch.nn.Module")
    verify.add_argument("--checkpoint", help="state dict to load into it (.pt, .pth or .safetensors)")
    verify.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (downloads them)")
    verify.add_argument("--shape", default="2x3x224x224", help="of the random input; default %(default)s")
    verify.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    verify.add_argument("--backend", default="auto", help="of the fused modules; default %(default)s")

    demo = commands.add_parser("demo", help="a timm EfficientViT on a photograph, reference and fused side by side")
    demo.add_argument("--image", help="path of a photograph; default: one that ships with matplotlib")
    demo.add_argument("--model", default="efficientvit_b1", help="a timm model with LiteMLA; default %(default)s")
    demo.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (downloads them)")
    demo.add_argument("--size", type=int, default=512, help="side of the input in pixels; default %(default)s")
    demo.add_argument("--batch", type=int, default=1, help="images at once; default %(default)s")
    demo.add_argument("--rounds", type=int, default=15, help="timed rounds; default %(default)s")
    demo.add_argument("--output", default="demo_output", help="folder of the picture and the JSON; default %(default)s")

    bench = commands.add_parser("bench", help="LiteMLA and its ops against eager, compilers and runtimes")
    add_options(bench)
    tasks.add_tasks(commands)
    return root


def run_verify(arguments: argparse.Namespace) -> int:
    import torch

    from .verify import calibrate_batch_norms, load_model, verify_model

    try:
        shape = tuple(int(size) for size in arguments.shape.split("x"))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        print(f"verify: shape must be BxCxHxW, got {arguments.shape!r}", file=sys.stderr)
        return 2
    model = load_model(arguments.model, arguments.checkpoint, arguments.pretrained)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if arguments.checkpoint is None and not arguments.pretrained:
        calibrate_batch_norms(model, x)
    dtype = getattr(torch, arguments.dtype)
    result = verify_model(model.to(dtype), x.to(dtype), arguments.backend, progress=lambda _: None)
    print(result.report)
    print(result)
    print("verified" if result.ok else "NOT verified: see the lines marked FAILED")
    return 0 if result.ok else 1


def run_plan(arguments: argparse.Namespace) -> int:
    from ._launch_plan import launch_plan, text_of

    sizes = arguments.plan.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"info: --plan must be BxCxHxW, got {arguments.plan!r}")
    plan = launch_plan(
        *map(int, sizes), head_dim=arguments.head_dim, kernel_size=arguments.kernel_size, fp32=arguments.fp32
    )
    print(json.dumps(plan, indent=2) if arguments.json else text_of(plan))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: done, and numbers agree; 1: they do not, or an error, told in one line; 2: wrong usage."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "info" and arguments.plan:
            return run_plan(arguments)
        if arguments.command == "info":
            from ._info import info

            found = info()
            print(json.dumps(found.as_dict(), indent=2) if arguments.json else found)
            return 0
        if arguments.command == "verify":
            return run_verify(arguments)
        if arguments.command == "bench":
            return run_bench(arguments)
        if arguments.command in tasks.COMMANDS:
            return tasks.run_task(arguments)
        from .demo import run_demo

        return run_demo(arguments)
    except (ImportError, OSError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        print(f"efficientvit_kernels {arguments.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
