"""The table of operators.

An `Op` is an entry of a table, never a bare string. Categories drive cost rules, memory rules and
warnings; an op of category OTHER is legal, priced by its bytes. Random ops are those whose result
depends on a generator; codegen replaces them by counter-based ones (see `runtime/rng.py`).
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass

import torch

from .collectives import NAMESPACE as COLLECTIVES
from .errors import CaptureError

__all__ = ["COLLECTIVES", "Category", "Op", "op_named", "resolve", "robust"]


class Category(enum.Enum):
    MATMUL = "matmul"
    ATTENTION = "attention"
    CONVOLUTION = "convolution"
    NORM = "norm"
    SOFTMAX = "softmax"
    LOSS = "loss"
    ELEMENTWISE = "elementwise"
    REDUCTION = "reduction"
    EMBEDDING = "embedding"
    INDEXING = "indexing"  # gather, scatter, index, sort, topk
    POOLING = "pooling"
    VIEW = "view"  # no bytes move
    COPY = "copy"  # cat, stack, clone, pad, roll: bytes move, nothing is computed
    FACTORY = "factory"  # creates a tensor from scalars
    RECURRENT = "recurrent"
    COLLECTIVE = "collective"  # of namespace cutset: ranks of one mesh axis take part
    OTHER = "other"


_PACKETS: dict[Category, str] = {
    Category.MATMUL: "linear matmul mm bmm addmm baddbmm addbmm mv dot addmv einsum bilinear "
    "grouped_mm _grouped_mm outer _trilinear",
    Category.ATTENTION: "scaled_dot_product_attention",
    Category.CONVOLUTION: "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d "
    "conv_transpose3d",
    Category.NORM: "layer_norm native_layer_norm group_norm native_group_norm batch_norm "
    "instance_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training rms_norm local_response_norm",
    Category.SOFTMAX: "softmax _softmax log_softmax _log_softmax _safe_softmax logsumexp",
    Category.LOSS: "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d mse_loss l1_loss "
    "smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div "
    "nll_loss_forward nll_loss2d_forward _ctc_loss ctc_loss",
    Category.REDUCTION: "sum mean amax amin max min argmax argmin prod any all var std var_mean "
    "norm linalg_vector_norm cumsum cumprod count_nonzero logcumsumexp",
    Category.EMBEDDING: "embedding embedding_bag",
    Category.INDEXING: "index index_select gather scatter scatter_add index_put index_add "
    "masked_fill masked_select sort topk nonzero where take_along_dim bucketize searchsorted "
    "scatter_reduce one_hot unique_consecutive index_copy slice_scatter select_scatter "
    "masked_scatter",
    Category.POOLING: "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_avg_pool1d max_pool1d "
    "max_pool2d_with_indices _adaptive_avg_pool2d avg_pool1d adaptive_max_pool2d max_pool3d "
    "avg_pool3d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_nearest1d "
    "upsample_linear1d grid_sampler grid_sampler_2d unfold im2col pixel_shuffle pixel_unshuffle",
    Category.VIEW: "view reshape _unsafe_view transpose permute t expand squeeze unsqueeze slice "
    "select split split_with_sizes chunk unbind narrow flatten alias detach view_as expand_as "
    "diagonal movedim swapaxes swapdims unflatten as_strided mT numpy_T real view_as_real "
    "view_as_complex lift_fresh lift_fresh_copy",
    Category.COPY: "cat stack clone contiguous pad constant_pad_nd roll repeat repeat_interleave "
    "flip _to_copy to tile tril triu copy hstack vstack concat reflection_pad2d reflection_pad1d "
    "replication_pad2d",
    Category.FACTORY: "arange zeros ones full empty zeros_like ones_like full_like empty_like eye "
    "scalar_tensor linspace new_zeros new_ones new_full new_empty empty_permuted tril_indices "
    "triu_indices rand rand_like randn randn_like randint randperm bernoulli",
    Category.RECURRENT: "lstm gru rnn_tanh rnn_relu",
    Category.ELEMENTWISE: "add sub mul div rsub neg abs exp log log1p expm1 sqrt rsqrt pow square "
    "relu gelu silu sigmoid tanh softplus elu leaky_relu hardtanh hardswish hardsigmoid mish "
    "relu6 selu celu clamp clamp_min clamp_max minimum maximum sin cos tan erf erfinv floor ceil "
    "round trunc sign reciprocal eq ne lt le gt ge logical_and logical_or logical_not bitwise_and "
    "bitwise_or bitwise_not bitwise_xor dropout native_dropout alpha_dropout feature_dropout "
    "addcmul addcdiv lerp fmod remainder floor_divide atan2 isnan isinf isfinite log_sigmoid "
    "threshold log2 log10 glu xlogy nan_to_num softshrink hardshrink tanhshrink prelu rrelu "
    "true_divide exp2 sgn logit polar complex fill __and__ __or__",
}
_CATEGORY = {packet: category for category, names in _PACKETS.items() for packet in names.split()}

_RANDOM = frozenset(
    "dropout native_dropout alpha_dropout feature_dropout feature_alpha_dropout rand rand_like "
    "randn randn_like randint randint_like randperm bernoulli multinomial normal rrelu "
    "rrelu_with_noise uniform exponential normal_functional poisson".split()
)


@dataclass(frozen=True, slots=True)
class Op:
    """An operator overload, e.g. `aten.linear.default`."""

    name: str
    category: Category
    random: bool

    @property
    def packet(self) -> str:
        """The name without namespace and overload: `linear`."""
        return self.name.split(".")[1]

    def __str__(self) -> str:
        return self.name


@functools.cache
def op_named(name: str) -> Op:
    """The table entry of `namespace.packet.overload`.

    Raises:
        CaptureError: `name` is not of that form. (Whether torch has it is checked by `resolve`.)
    """
    parts = name.split(".")
    if len(parts) != 3 or not all(parts):
        raise CaptureError(f"{name!r} is not an operator name (namespace.packet.overload)")
    packet = parts[1]
    if parts[0] == COLLECTIVES:
        return Op(name, Category.COLLECTIVE, False)
    return Op(name, _CATEGORY.get(packet, Category.OTHER), packet in _RANDOM)


def resolve(op: Op) -> torch._ops.OpOverload:
    """The torch operator that `op` names.

    Raises:
        CaptureError: this build of torch does not have it.
    """
    namespace, packet, overload = op.name.split(".")
    try:
        target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (AttributeError, RuntimeError) as error:
        raise CaptureError(
            f"torch {torch.__version__} has no operator {op.name}",
            ways_out=("capture the model again with this version of torch",),
        ) from error
    assert isinstance(target, torch._ops.OpOverload)
    return target


# Whether a view exists depends on strides, and so on the kernels that this device has.
_ROBUST = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
}


def robust(name: str) -> str:
    """The operator that is run for the one called `name`, whatever the strides of its operands."""
    return _ROBUST.get(name, name)
