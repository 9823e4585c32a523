"""Triton kernels of the forward pass, for half precision on a GPU. operations.py has the definition of each.

    products.py         a product with GELU or the rotation of q and k in its epilogue
    norms.py            LayerNorm with the additions before and after it
    attention.py        attention
    grid_attention.py   attention to a grid with a bias by row and column
    boxes.py            boxes, their sine encoding, and the bias by their sides
    group_norm.py       GroupNorm, ReLU, and the sum with the next finer map
    patches.py          pixels to patches

Importing this package needs Triton; running a kernel needs a C compiler the first time.
"""

from sam3_runner.network.kernels.attention import attend
from sam3_runner.network.kernels.boxes import MAX_HEADS, box_bias, refined_boxes
from sam3_runner.network.kernels.grid_attention import PATCH, attend_grid
from sam3_runner.network.kernels.group_norm import group_norm_relu
from sam3_runner.network.kernels.norms import norm
from sam3_runner.network.kernels.patches import patches
from sam3_runner.network.kernels.products import TILE_COLUMNS, product

__all__ = [
    "MAX_HEADS",
    "PATCH",
    "TILE_COLUMNS",
    "attend",
    "attend_grid",
    "box_bias",
    "group_norm_relu",
    "norm",
    "patches",
    "product",
    "refined_boxes",
]
