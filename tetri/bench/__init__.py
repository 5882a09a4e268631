"""Benchmarks and checks: the code of the programs in tools/ and of bin/demo.

Each program in tools/ calls `main` of the module or package that it names. They share `report` (names of results,
tables, JSON), `deployment` (starts and stops a cluster), `in_process` (one engine in the program's own process),
`plots` and `length_plot` (plots, which tetri-cli also uses).

`chaos`, `parity`, `gpu_check`, `fit_workloads`, `predictor_chain`, `sizing` and `demo` check results instead of
measuring speed; `dashboard`, `picture` and `configuration_page` write files of conf/ and docs/.
Only `tetri-cli` imports this package, for plots.
"""
