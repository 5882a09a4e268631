"""Measurements: what each program of tools/ runs, and bin/demo.

A program `tools/bench_NAME` or `tools/NAME` is only a call; its command line is `main` in the module or package that it
names. What they share: `report` (names of results, tables, JSON), `deployment` (a cluster of its own, started and
stopped), `in_process` (one engine in the program itself), `plots` and `length_plot` (pictures, of tetri-cli too).

`chaos`, `parity`, `gpu_check`, `fit_workloads`, `predictor_chain` and `demo` do not measure speed but show that
something holds, with the same means; so they are here too. Only `tetri-cli` imports this package, for pictures.
"""
