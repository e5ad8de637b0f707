"""The specification in plain torch: any dtype, float64 included, and no speed tricks."""

from .relu_linear_attention import relu_linear_attention as relu_linear_attention
