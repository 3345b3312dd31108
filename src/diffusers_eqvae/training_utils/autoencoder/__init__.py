"""What `training/train_autoencoder.py` is made of, from its arguments."""
