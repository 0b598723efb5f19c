"""Device code and its launchers: installed as `prefixloss._kernels`.

One naming scheme for every kernel in this package:
- Arguments come in this order: inputs, outputs, strides, sizes, scalars, then `constexpr` in capitals.
- Pointers end in `_ptr`. A block is named by what it holds (`logits`, `probs`), offsets are `row` and `cols`.
- An option is a `constexpr` flag (`HAS_BIAS`), never a second kernel. A row's offset is computed in 64 bits.
- A file starts with the formula its kernel computes and the bytes it must move.
- A launcher checks nothing and allocates nothing that its caller could; it computes the grid.

This release has no kernels: `backend="torch"` does the work.
"""
