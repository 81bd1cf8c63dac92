"""Scripts that rebuild the embedded models: ``python -m keeprate.train.<name>``."""
