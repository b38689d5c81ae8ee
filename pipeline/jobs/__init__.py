"""Many conversions: batches, the store that remembers them, and the daemon that does them by schedule.

requests.py    what is asked: job files, directories, globs and matrices, as single jobs
units.py       jobs of one source become one conversion; the order they are done in
store.py       jobs, runs and attempts in SQLite (tables.py), and who may write where (leases.py)
runner.py      does what is queued, each conversion in a process of its own (child.py, process.py)
serve.py       the daemon: triggers (schedule.py, watch.py) that queue jobs
events.py      what happens, for whoever listens
services.py    what the daemon does beside: its page, metrics and HTTP (overview.py, overview_page.py, http.py, listening.py), and
               notifications (notify.py, messages.py, channels.py, webhook.py, apprise_channels.py); secret.py for both
"""
