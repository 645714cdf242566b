"""fit(), the training loop and what it calls: evaluation, micro-batch size, the check of the loss."""
