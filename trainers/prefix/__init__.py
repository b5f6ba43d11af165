"""The cached prefix: layers below all trained parameters run once per row, not once per step.

    tokens ──► block 0 … block n-1 ──► h ──► block n … block N-1 ──► head ──► log-probabilities
               └── cached prefix ────┘ │     └── suffix ──────────────────┘         │
                  frozen: its output   │        trained: runs in every step,        │
                  is a constant of     │        without padding, and a prefix       │
                  the row              │        that rows share runs once           │
                                       ▼                                            ▼
                     CachedStates: h of each row, (tokens, d)        CachedReference: `at(0)` of each row's
                     PromptCaches: keys and values of prompts          labels, (labels,), in 32 bits
                       in the suffix, where no prompt token
                       is steered
                                       └────────► TensorStore: RAM, then disk ◄─────┘
                                   key = digest(weights, settings, precision, row)

A vector on the output of block i does not change block i itself, so n = i + 1.

| file | what it holds |
|---|---|
| `frozen.py` | `FrozenPrefix`, which users share between trainers, and `CachedPrefix`, which belongs to one trainer |
| `cached_pass.py` | one forward pass, and what it skips |
| `proofs.py` | the comparison of each shortcut with the plain path, before it is used |
| `cached_states.py` | the cached values of a row: states below the suffix, and the reference |
| `new_rows.py` | the states of new rows, several in one pass, each bitwise independent of the others |
| `packing.py` | the suffix on rows without padding, packed into one line of tokens |
| `prompts.py` | the suffix on rows in two parts: prompts, and what follows them |
| `generation.py` | the prompts of a generation, packed into one line of tokens |
| `decoder.py` | a stack of blocks that can start at block n |
| `checkpointing.py` | gradient checkpointing that recomputes a block exactly as it ran |
| `exactness.py` | when all this is exact, how that is verified, when it is off and how that is reported |
| `store.py` | tensors, keyed by the content they were computed from |

Shape suffixes: `h_RCD` has the axes R (rows of a batch), C (columns: tokens of a row, with padding), D (width of the
residual stream), T (tokens in one line, without padding), H (heads), P (distinct prompts).
"""

from .frozen import FrozenPrefix

__all__ = ["FrozenPrefix"]
