"""The specification in plain torch: any dtype, float64 included, and no speed tricks."""

from .lite_mla import lite_mla as lite_mla
from .multiscale_aggregate import multiscale_aggregate as multiscale_aggregate
from .relu_linear_attention import relu_linear_attention as relu_linear_attention
