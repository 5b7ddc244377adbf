"""A Flower app whose chain has as many trainers as the run config says."""
