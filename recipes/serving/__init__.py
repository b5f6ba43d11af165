"""The service behind `steertune serve`: one engine that batches requests with different vectors.

`engine.py` works on the jobs of `jobs.py`, with the help of `cache.py`, `sampling.py` and `text.py`. `vectors.py`
holds the vectors, which can be added and removed while it runs. Requests arrive as lines of JSON (`line_service.py`)
or by OpenAI's protocol (`app.py`: `schema.py` checks a request, `service.py` runs it, `answers.py` writes the
response).
"""
