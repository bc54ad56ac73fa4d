"""Pictures of runs, tables and codes: ``python -m ecoformer.plots --help``."""
