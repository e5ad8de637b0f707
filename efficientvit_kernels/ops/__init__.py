"""Public ops: checks, choice of the backend, autograd."""

from .relu_linear_attention import relu_linear_attention as relu_linear_attention
