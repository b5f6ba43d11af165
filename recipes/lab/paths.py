"""Where the recipes keep what they read."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parents[1]
CONFIGS = RECIPES / "configs"
TASKS = RECIPES / "tasks"
