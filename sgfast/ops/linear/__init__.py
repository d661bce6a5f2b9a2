"""Divergences of sides whose logits are not computed yet: `sgfast.ops.divergences` with a `LinearLogits`.

`operation` has the calls. The registered `operator` walks over the rows. `chunks` computes the logits of a few rows by
the `products`, solves the divergences of these rows as `sgfast.ops.divergence` does, writes the gradient where the
logits were, and multiplies the gradient back to hidden states and heads. `problem` has the operator's arguments.
"""
