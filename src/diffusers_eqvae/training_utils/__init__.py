"""training_utils"""
