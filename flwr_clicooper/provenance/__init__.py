"""What parties can prove: who they are and what they did. No Flower, no PyTorch."""
