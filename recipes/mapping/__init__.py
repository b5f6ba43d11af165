"""A map of interventions: the effect of a vector at each layer, alone and together with others (see `map.py`).

| file | content |
|---|---|
| `interventions.py` | a unit vector per layer, all at one KL to the base; controls; the effect of any set of them |
| `gradient.py` | the first-order estimate of every unit vector's effect |
| `effects.py` | main effects, interactions and predictions, from the effects of sets |
| `page.py` | the page |
"""
