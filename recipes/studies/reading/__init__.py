"""Read, control, silence: what a direction says, does, and is needed for (see `read_control.py`).

| file | what it holds |
|---|---|
| `directions.py` | the directions of a task: closed forms, random ones, and the arc between two |
| `jobs.py` | the three jobs of a direction at a layer, measured |
| `predictors.py` | cheap numbers that might say which layer controls best |
| `choice.py` | what follows from them: rank correlations, the regret of a choice, verdicts |
| `page.py` | the page |
"""
