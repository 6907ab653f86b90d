"""What each step of the pipeline does: read params.yaml and inputs, call glm, write outputs, log to MLflow.

A step is a program, `python -m tasks.<step>`; `dvc.yaml` says what it reads and writes. No algorithm lives here.
"""

# In the order they run.
STEPS = ("fetch", "preprocess", "base", "sft", "evaluate_sft", "reward", "ppo", "evaluate", "export")
