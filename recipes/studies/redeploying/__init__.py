"""Catch and redeploy: fixes and monitors from a few catches, on several organisms (see `redeploy.py`).

| file | what it holds |
|---|---|
| `reduced.toml`, `full.toml` | studies: organisms, numbers of catches, arms, the claim and its card |
| `tables.py` | reads them |
| `world.py` | an organism with its requests and its answers |
| `fixes.py` | a fix made from some of the catches, as trained and at the study's KL |
| `probes.py` | monitors fitted on some of the catches, compared with TF-IDF |
| `verdicts.py` | bad rates, differences between arms over organisms, the claim |
| `page.py` | the page |
"""
