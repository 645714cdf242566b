"""Events of a run, and where they are sent: metrics.jsonl, the terminal, TensorBoard, W&B, MLflow."""
