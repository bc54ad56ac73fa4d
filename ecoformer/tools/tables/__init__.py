"""The paper's tables, and our own, by one command each: ``ecoformer tables --help``."""
