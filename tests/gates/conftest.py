from sgfast.ops import dispatch

# Modules that only a process that interprets kernels may import; doctest collection would import them everywhere.
collect_ignore = [] if dispatch.interpreting() else ["strict", "planted_bugs.py", "interpreted_cases.py"]
