"""Triton kernels: `phi` has the scalar functions, `pointwise` the kernels and their launchers.

Importing this package imports Triton and nothing else: no driver call, no compilation. The ops of
`fusedshape.ops` import it at the first call that needs it.
"""
