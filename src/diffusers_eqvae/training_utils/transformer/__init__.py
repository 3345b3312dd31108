"""What `training/train_transformer.py` is made of, from its arguments."""
