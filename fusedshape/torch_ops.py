"""The one table of what torch's operations and modules do, by name.

An operation is listed under its name in torch, torch.nn.functional, Tensor, operator or aten,
without dimensions and leading underscores: `base` reduces ``max_pool2d`` to ``max_pool``. A module
is listed under the name of the function that it computes (`function_of`).
"""

from __future__ import annotations

import functools
import re
from typing import Any

from torch import nn

from fusedshape.activations import TORCH_NAMES


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# These return no tensor. `type` with an argument is a cast: see `nodes.is_query`.
QUERIES = _names(
    "size dim ndim shape numel nelement ndimension stride storage_offset dtype device layout type "
    "get_device is_contiguous is_floating_point is_complex is_cuda requires_grad element_size "
    "itemsize nbytes item"
)

# The same values; a new tensor only if dtype, device or memory format change.
CASTS = _names("to type type_as float double half bfloat16 cpu cuda contiguous")
# The tensor itself, or a cast of it.
SAME = CASTS | _names("detach data alias identity checkpoint requires_grad pos positive")
# The same values in new memory.
COPIES = _names("clone lift_fresh lift_fresh_copy to_copy")

# Views of all elements, in their order in memory;
RESHAPES = _names(
    "view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze unsafe_view "
    "reshape_alias"
)
# of all elements, with the dimensions in another order;
TURNS = _names(
    "transpose permute movedim moveaxis swapaxes swapdims t T mT H mH adjoint numpy_T rearrange"
)
# of some elements, as several tensors (PARTS) or one;
PARTS = _names(
    "chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind unsafe_chunk "
    "unsafe_split unsafe_split_with_sizes"
)
CUTS = PARTS | _names("narrow select slice getitem diagonal real")
# of elements that may appear more than once.
SPREADS = _names("expand expand_as broadcast_to unfold as_strided")
VIEWS = RESHAPES | TURNS | CUTS | SPREADS

# The elements in other places, in new memory.
MOVES = _names(
    "roll flip fliplr flipud rot90 repeat tile repeat_interleave pixel_shuffle pixel_unshuffle "
    "channel_shuffle native_channel_shuffle index index_select gather take_along_dim "
    "reflection_pad replication_pad circular_pad"
)
# From images to blocks, with zero padding, and back, where overlapping blocks are added.
BLOCKS = _names("im2col fold col2im")
# Padding with constants; `pad` with another mode moves elements.
PADS = _names("pad constant_pad constant_pad_nd")
RESIZES = _names("interpolate upsample upsample_nearest upsample_nearest_exact") | _names(
    "upsample_linear upsample_bilinear upsample_trilinear upsample_bicubic upsample_bilinear_aa "
    "upsample_bicubic_aa"
)

# Pools: means over several locations,
MEANS = _names("mean adaptive_avg_pool avg_pool")
# maxima and minima,
EXTREMES = _names("amax amin adaptive_max_pool max_pool fractional_max_pool")
# and all pools.
POOLS = MEANS | EXTREMES | _names("sum max min lp_pool max_unpool")
# The pools that take dimensions.
REDUCTIONS = _names("mean sum amax amin max min")

# Dropout that multiplies by 0 or by one number,
DROPOUTS = _names("dropout feature_dropout stochastic_depth drop_path")
# and dropout that sets elements to another number than 0.
ALPHA_DROPOUTS = _names("alpha_dropout feature_alpha_dropout")

# Norms of each location by itself,
LOCATION_NORMS = _names("layer_norm rms_norm normalize")
# and of a channel, over locations or over the batch.
CHANNEL_NORMS = _names("batch_norm instance_norm group_norm")
NORMS = LOCATION_NORMS | CHANNEL_NORMS

SUMS = _names("add iadd")
DIFFERENCES = _names("sub isub subtract rsub")
PRODUCTS = _names("mul imul multiply")
QUOTIENTS = _names("div divide true_divide truediv itruediv")
ARITHMETIC = SUMS | DIFFERENCES | PRODUCTS | QUOTIENTS | {"neg"}
CONCATS = _names("cat concat concatenate")

# Products with a matrix other than those of layers, for which see `fusedshape.kinds`.
#: Methods that take no more than the shape or the dtype of their second argument.
LIKE_ANOTHER = _names("expand_as view_as reshape_as type_as to")
MATMULS = _names("matmul mm addmm einsum")
SOFTMAXES = _names("softmax log_softmax softmin")
ATTENTION = _names("scaled_dot_product_attention multi_head_attention_forward")

# New tensors that do not depend on the values of their argument.
NEW = _names(
    "zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros "
    "new_ones new_full new_empty new_empty_strided new_tensor bernoulli"
)
# New tensors filled with one number, and that number.
FILLED = {"zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}

# Operations whose result may share memory with their argument.
ALIASES = SAME | VIEWS | DROPOUTS | ALPHA_DROPOUTS | {"getattr"}

#: The function that each of torch's activation modules computes.
ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    known.module: known.name for known in TORCH_NAMES if known.module is not None
}

#: The same for modules that are neither layers nor activations.
MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.Flatten: "flatten",
    nn.Unflatten: "unflatten",
    nn.Fold: "fold",
    nn.Unfold: "unfold",
    nn.PixelShuffle: "pixel_shuffle",
    nn.PixelUnshuffle: "pixel_unshuffle",
    nn.ChannelShuffle: "channel_shuffle",
    nn.Upsample: "interpolate",
    nn.Dropout: "dropout",
    nn.Dropout1d: "dropout1d",
    nn.Dropout2d: "dropout2d",
    nn.Dropout3d: "dropout3d",
    nn.AlphaDropout: "alpha_dropout",
    nn.FeatureAlphaDropout: "feature_alpha_dropout",
    nn.LayerNorm: "layer_norm",
    nn.RMSNorm: "rms_norm",
    nn.GroupNorm: "group_norm",
    nn.LocalResponseNorm: "local_response_norm",
    nn.Softmax: "softmax",
    nn.Softmax2d: "softmax",
    nn.LogSoftmax: "log_softmax",
    nn.Softmin: "softmin",
    nn.GLU: "glu",
    nn.MultiheadAttention: "multi_head_attention_forward",
    nn.LPPool1d: "lp_pool1d",
    nn.LPPool2d: "lp_pool2d",
    nn.LPPool3d: "lp_pool3d",
    nn.FractionalMaxPool2d: "fractional_max_pool2d",
    nn.FractionalMaxPool3d: "fractional_max_pool3d",
}
_BY_DIMENSION = {
    "AvgPool": "avg_pool",
    "MaxPool": "max_pool",
    "MaxUnpool": "max_unpool",
    "AdaptiveAvgPool": "adaptive_avg_pool",
    "AdaptiveMaxPool": "adaptive_max_pool",
    "ConstantPad": "constant_pad",
    "ZeroPad": "constant_pad",
    "ReflectionPad": "reflection_pad",
    "ReplicationPad": "replication_pad",
    "CircularPad": "circular_pad",
    "BatchNorm": "batch_norm",
    "InstanceNorm": "instance_norm",
}
MODULES |= {
    getattr(nn, f"{module}{n}d"): f"{name}{n}d"
    for module, name in _BY_DIMENSION.items()
    for n in (1, 2, 3)
}

#: All nonlinear functions of torch.
NONLINEAR = {*(known.name for known in TORCH_NAMES), *SOFTMAXES, *ATTENTION, "glu"}

#: The attribute in which a wrapper keeps its module. Listed by name, because importing
#: torch._dynamo takes seconds.
WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}

# aten has variants of these: native_batch_norm, _native_batch_norm_legit, _fused_rms_norm, …
_VARIANTS = re.compile("(batch|instance|group|layer|rms)_norm|(feature_)?(alpha_)?dropout")
_WRITING_OPERATORS = _names("iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor")


def name_of(target: Any) -> str:
    """The name of a node's target.

    Example:
        >>> import torch
        >>> name_of(torch.relu), name_of("relu_")
        ('relu', 'relu_')
    """
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


@functools.cache
def base(name: str) -> str:
    """A name without dimensions, leading underscores and the marks of aten's variants.

    Example:
        >>> base("conv_transpose2d"), base("max_pool2d_with_indices"), base("native_layer_norm")
        ('conv_transpose', 'max_pool', 'layer_norm')
    """
    variant = _VARIANTS.search(name)
    if variant is not None:
        return variant[0]
    return re.sub(r"(?<=[a-z])[123]d", "", name.lstrip("_")).removesuffix("_with_indices")


def writes(name: str) -> bool:
    """Whether a function of this name changes its first argument in place.

    Example:
        >>> writes("relu_"), writes("relu"), writes("__add__"), writes("iadd")
        (True, False, False, True)
    """
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITING_OPERATORS


def function_of(module: nn.Module | None) -> str:
    """The name of the function that a module computes; "" if its class is not in the table.

    A subclass has its base's name, unless it has a forward of its own.

    Example:
        >>> function_of(nn.MaxPool2d(2)), function_of(nn.ReLU6()), function_of(nn.Linear(1, 1))
        ('max_pool2d', 'relu6', '')
    """
    own: Any = type(module)
    for cls in own.__mro__:
        found = ACTIVATION_MODULES.get(cls) or MODULES.get(cls)
        if found:
            return found if own.forward is cls.forward else ""
    return ""
