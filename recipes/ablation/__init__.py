"""The instrument behind `ablate` and `report`: grids, equal budgets, cells, matched strength, scorers, statistics."""
