"""The metric module equivariance_error."""
