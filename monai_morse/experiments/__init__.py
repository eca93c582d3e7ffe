"""Experiments: grids of trainings run, and tables and figures made of them."""
