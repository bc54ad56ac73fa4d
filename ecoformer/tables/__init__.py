"""The paper's tables, and our own, by one command each: ``python -m ecoformer.tables --help``."""
