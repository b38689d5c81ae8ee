"""Many conversions: batches, and the daemon that does them by schedule.

What is asked for: requests.py (files, directories, patterns), matrix.py (every combination), units.py (jobs of one source as one
conversion, and their order). What is done: fleet.py (units as tasks of a Dask cluster) with runs.py, retry.py, tasks.py, attempt.py
and child.py (a conversion in a process of its own). Who does it: batch.py (`headrace batch`), and serve.py (`headrace serve`) with
schedule.py, watch.py and history.py. What is said: log.py, overview.py (page, metrics, JSON), notify.py, report.py (what
the commands print). files.py: the TOML of all of them.
"""
