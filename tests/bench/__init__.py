"""`python -m tests.bench`: what the relay costs, next to nginx and to no proxy at all, measured in one run.

Three programs take part, each in a process of its own: the stub (`stub.py`, the upstream), the target (a proxy under
measurement, `targets.py`) and the load generator (`load.py`). The target has one core to itself where there are two;
the other two programs share the other core. `measure.py` runs the rounds, `report.py` prints them.

Adding a column is one more `Target` in `targets.py`; streams in other APIs are kinds of load in `measure.py`, spoken as
`apis.py` says.
"""
