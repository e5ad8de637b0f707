"""Which modules of other libraries are a LiteMLA that `FusedLiteMLA` can stand in for.

They are recognised by qualified class name and structure, so that no host library is imported for it.
"""

from __future__ import annotations

from torch import nn

OWN = "efficientvit_kernels.nn.lite_mla.LiteMLA"
OWN_FUSED = "efficientvit_kernels.nn.lite_mla.FusedLiteMLA"
OFFICIAL = "efficientvit.models.nn.ops.LiteMLA"
# timm's computes the attention in float32 for every dtype and has eps 1e-5; ours reads eps from the module.
TIMM = "timm.models.efficientvit_mit.LiteMLA"
LITE_MLA_CLASSES = (OWN, OWN_FUSED, OFFICIAL, TIMM)

# The hosts' convolution with norm and activation: forward is dropout, conv, norm, act, each where it exists.
CONV_LAYER_CLASSES = (
    "efficientvit_kernels.nn.conv.ConvLayer",
    "efficientvit.models.nn.ops.ConvLayer",
    "timm.models.efficientvit_mit.ConvNormAct",
)
CONV_LAYER_SUBMODULES = ("dropout", "conv", "norm", "act")

SUBMODULES = ("qkv", "aggreg", "kernel_func", "proj")


def class_name(module: object) -> str:
    """Qualified name of the object's class, e.g. "timm.models.efficientvit_mit.LiteMLA"."""
    return _qualified(type(module))


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def why_not_lite_mla(module: object) -> str | None:
    """Why `module` is not a LiteMLA that FusedLiteMLA reproduces ("is ...", "has ..."); None if it is one."""
    if not isinstance(module, nn.Module):
        return f"is of type {type(module).__name__}, not a torch.nn.Module"
    name = class_name(module)
    if name not in LITE_MLA_CLASSES:
        bases = [_qualified(base) for base in type(module).__mro__[1:]]
        known = next((base for base in bases if base in LITE_MLA_CLASSES), None)
        if known is not None:
            return f"is a {name}, a subclass of {known} that may compute something else"
        return f"is a {name}, which is none of the known LiteMLA classes"
    if "forward" in module.__dict__:
        return "has a forward of its own, set on the instance"
    if module.__dict__.get("_compiled_call_impl") is not None:
        return "has been compiled in place with .compile(); accelerate first, then compile"
    return _why_not_structure(module)


def _why_not_structure(module: nn.Module) -> str | None:
    dim, eps = getattr(module, "dim", None), getattr(module, "eps", None)
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        return f"has no positive integer attribute dim (it is {dim!r})"
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        return f"has no finite, non-negative attribute eps (it is {eps!r})"
    children = set(module._modules)
    if children != set(SUBMODULES):
        return f"has the submodules {', '.join(sorted(children))}, where a LiteMLA has {', '.join(sorted(SUBMODULES))}"
    if module._parameters or module._buffers:
        return f"has parameters or buffers of its own: {', '.join([*module._parameters, *module._buffers])}"
    if not isinstance(module.aggreg, nn.ModuleList):
        return f"has an aggreg of type {type(module.aggreg).__name__}, where a LiteMLA has a ModuleList"
    if type(module.kernel_func) is not nn.ReLU:
        return f"has the kernel function {type(module.kernel_func).__name__}, and the kernels compute ReLU"
    return None
