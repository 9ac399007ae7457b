"""Small reference models that notebooks, docs and tests share. Each is plain PyTorch, written to be read."""
