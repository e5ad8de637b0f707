"""Modules: the official LiteMLA in reference form, and the fused one that takes its place."""

from .lite_mla import FusedLiteMLA as FusedLiteMLA
from .lite_mla import LiteMLA as LiteMLA
