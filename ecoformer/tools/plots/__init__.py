"""Pictures of runs, tables and codes: ``python -m ecoformer.tools.plots --help``."""
