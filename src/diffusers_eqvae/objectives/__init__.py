"""What each product minimises: the one wrapped forward around a model and its regularizers."""
