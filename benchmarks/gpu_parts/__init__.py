"""Parts of `gpu_suite.py`, one a module: each has `NEEDS`, `cases` and `summary`.

* ``NEEDS``: seconds without which a case is not begun;
* ``cases(context)``: functions by name; each returns what goes into the JSON, and fails by raising;
* ``summary(results)``: lines of the table at the end, from the results by case.
"""
