"""Jobs: commands of the command line that the server runs, as local processes or on a Ray cluster.

A restarted server reattaches to running jobs, marks dead ones interrupted and starts queued ones. No attempt runs
twice.

Read `store.py` first: the table of jobs and their states. `watcher.py` is the loop that starts jobs and records their
ends, `backend.py` the interface of `local.py` and `ray.py`, `child.py` the process around a command, and `kinds.py` the
check of a job request.
"""
