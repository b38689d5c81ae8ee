"""Many conversions: batches, the store that remembers them, and the daemon that does them by schedule.

What is asked for: requests.py (files, directories, patterns), matrix.py (every combination), units.py (jobs of one source as one
conversion, and their order), submit.py (into a queue of the store).

What is known: store.py (jobs, runs, attempts and what may become of them), reading.py (the same for those who only look), leases.py
(who may write where), tables.py (SQLite), rows.py (values), recovery.py (after workers that are gone), retention.py (what is kept).

What is done: runner.py (works off a queue), conversion.py and child.py (a conversion in a process of its own), process.py (what the
system says of it), limits.py (how many at a time), retry.py (what is tried again), events.py and log.py (what happens).

Who does it: batch.py (`headrace batch`), serve.py (`headrace serve`) with schedule.py, watch.py, fetch.py, planner.py and aside.py,
lock.py (one daemon a store). report.py: what the commands print; files.py: the TOML of all of them.

What the daemon does beside: services.py; its page, metrics and HTTP (overview.py, overview_page.py, http.py, listening.py), and
notifications (notify.py, messages.py, channels.py, webhook.py, apprise_channels.py); secret.py for both.
"""
