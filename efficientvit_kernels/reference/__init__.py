"""The specification in plain torch: any dtype, float64 included, and no speed tricks."""

from .multiscale_aggregate import multiscale_aggregate as multiscale_aggregate
from .relu_linear_attention import relu_linear_attention as relu_linear_attention
