"""What leaves the owner, and what that guarantees. Plain PyTorch, NumPy and SciPy."""
