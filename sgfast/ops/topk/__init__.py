"""The top-k support of two sets of logits: `top_k_support`."""

from sgfast.ops.topk.operation import top_k_support

__all__ = ["top_k_support"]
