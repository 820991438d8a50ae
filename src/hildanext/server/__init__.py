"""The HTTP server of `hildanext serve`: /generate, OpenAI's API, /jobs, /health, /metrics and the web page.

Read `app.py` first: it builds the application from the routes. `worker.py` runs the engine in a thread of its own,
`guard.py` checks keys and sizes before a body is read, `command.py` starts everything, `web/` holds the page's files.
"""
