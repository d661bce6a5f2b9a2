from sgfast.ops import dispatch

# Modules that only a process that interprets kernels may import; doctest collection would import them everywhere.
_interpreted = ["strict", "planted_bugs.py", "interpreted_cases.py", "interpreted_growth.py", "philox_kernels.py"]
collect_ignore = [] if dispatch.interpreting() else _interpreted
