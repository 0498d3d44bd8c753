"""Benchmarks that install with the package: one list of cases, one runner, records that check.

`cases` says what is measured and `suites` when, `providers` and `constants` have those who compute
it, `runner` checks and times them, `records` is the file, `text`, `compare` and `plot` read it,
`revisions` makes two to compare, and `command` is `fusedshape bench`.
"""
