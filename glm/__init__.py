"""How the pipeline's steps work: models, data, training, generation, evaluation.

This package knows nothing of Prefect, DVC or MLflow and is usable from a notebook. Importing it is cheap: torch and
transformers load with the modules that need them.
"""

__version__ = "0.1.0"
