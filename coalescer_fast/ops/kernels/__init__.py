"""A folder an op, named as the op.

They are not beside `coalescer_fast.ops`'s functions, for these have the same names: importing the module
``ops.group_norm_silu`` would put it in the place of the function ``ops.group_norm_silu``.
"""
