"""All that computes gradients and steps: torch, DDP and DeepSpeed, noise hooks and probes."""
