"""Records and arithmetic that every decision is made from: progress, plan, order, stages, noise."""
