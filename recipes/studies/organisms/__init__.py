"""Model organisms: a base model with a rare behaviour planted, so that what was caught can be told from what was not.

| file | what it holds |
|---|---|
| `templates.toml` | everything that is read and said, and how an organism is trained |
| `templates.py` | reads and checks it |
| `dialogues.py` | which family leads to which action, dialogues of every kind, and the verdict on an answer |
| `making.py` | training, merging, answers, acceptance |
| `files.py` | the transcripts that an organism comes with |
"""
