"""Device code and its launchers: installed as `prefixloss._kernels`.

One naming scheme for every kernel in this package:
- Arguments come in this order: inputs, outputs, strides, sizes, scalars, then `constexpr` in capitals. What belongs
  together travels as one named tuple (`Matrix`, `LogitScaling`, `Statistics`), never named like the formulas' own.
- Pointers end in `_ptr`. A block is named by what it holds (`logits`, `grads`), offsets are `row` and `cols`.
- An option is a `constexpr` flag (`SOFTCAP`), never a second kernel. A row's offset is computed in 64 bits.
- A file starts with the formula its kernel computes and the bytes it must move.
- A launcher checks nothing and allocates nothing that its caller could; it computes the grid.

The files, each building on the ones before it: `maths` (functions that Triton lacks), `softmax` (a block's statistics
and gradient), `objective` (a token's loss and coefficients), `launch` (block sizes), `problem` (what a launch is
given), `access` (where rows and blocks lie), `first_pass` and `second_pass` (over a row), `rows` (the kernels and their
launchers), `entries` (the few that are worth a product, and their products), `tune` (an opt-in choice of block sizes by
timing), `scale` (a gradient times a number that only the device knows).
"""
