"""Parts of `gpu_suite.py`, one a module: each has `NEEDS` and `cases`.

* ``NEEDS``: seconds without which a case is not begun;
* ``cases(context)``: functions by name; each returns what goes into the JSON, and fails by raising.

Tables of their results are made by `gpu_report.summary`.
"""
