"""The service behind `steertune serve`: one engine that batches requests, each with vectors of its own.

`jobs.py` is what the engine works on and `engine.py` how; `cache.py`, `sampling.py` and `text.py` are its parts.
`vectors.py` holds the vectors, which come and go while it runs. Two ways lead to it: lines of JSON (`line_service.py`)
and OpenAI's protocol (`app.py`, with `schema.py` for what is asked, `service.py` for what is done and `answers.py` for
what is sent).
"""
