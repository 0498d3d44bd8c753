"""Benchmarks that are installed with the package.

`cases` lists what is measured and `suites` selects from it. `providers` and `constants` build the
candidates, `runner` checks and times them, and `records` reads and writes the file of a run.
`text`, `compare` and `plot` present records, `revisions` measures two git revisions, and `command`
is `fusedshape bench`.
"""
