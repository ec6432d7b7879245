"""What recorded routing and a running model tell about residency: the paper's experiments and their pictures.

`correlation` and `sets` read a trace; `workload` has periods of refresh, with a model or without; `recording` runs a
model; `report` writes HTML and JSON, `figures` draws. `emoe analyze` is the command; docs/traces.md defines measures.
"""
