"""Model organisms: a base model with a planted rare behaviour, of which only a known part was caught.

| file | what it holds |
|---|---|
| `templates.toml` | all texts, and how an organism is trained |
| `templates.py` | reads and checks it |
| `dialogues.py` | which family leads to which action, dialogues of every kind, and the verdict on an answer |
| `making.py` | training, merging, answers, acceptance |
| `files.py` | the transcripts that an organism comes with |
"""
