"""Implementation of `ablate` and `report`: grids, equal budgets, cells, matched strength, statistics."""
